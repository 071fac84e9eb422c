"""Fuzzing of everything that is parsed: whatever the bytes, an error of storage/errors.py, or a value that makes sense.

    target    a parser behind one function of bytes, with the errors it may raise (targets.py, history.py, processes.py)
    seed      a valid input, from tests/golden or made by the encoder: what mutation starts from
    corpus    corpus/<target>/: inputs that once found something or reach code that others do not, replayed by scripts/test for good

Three ways to run them: `tests/test_fuzz.py` replays seeds, corpus and some thousand seeded mutations of both (replay.py, a process with
little memory); `scripts/fuzz` lets atheris look for more, guided by coverage (fuzzer.py), and stores what it finds in the corpus; and
`python -m tests.fuzz.replay TARGET FILE` is for looking at one input.

Checksums and tags would stop a fuzzer at the door, so many targets take what stands *behind* them: the input is the body, and the target
seals it with the key that tests use (frames.py).
"""
