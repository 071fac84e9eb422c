"""Real servers for tests and for the README's walk-through: each a module that starts one in processes of its own, and ends it."""
