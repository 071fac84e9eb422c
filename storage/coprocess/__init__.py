"""A second process of this program: it seals and opens, and puts on disks and reads from them what is sealed, beside the event loop.

Why: an interpreter has one lock, and each system call and each block that is sealed lets it go and takes it back. Threads that seal and put
sectors so kept the event loop waiting for as long as it worked (docs/performance.md). A process of its own has its own lock.

Vocabulary: the *arena* is memory both processes see, from which large buffers are lent; a *place* is where in it something stands; a
*channel* is a socket on which one thread here asks for one thing at a time, and one thread there answers.

      this process                                                 the coprocess (serve)
        a thread: copies plaintext into the arena --- Seal ------->  seals it, in the arena        }
        a thread: lets the host go on             --- Put --------->  Tree.put, out of the arena   }  no lock shared with the event loop
                  is it still wanted?             <-- Wanted? -----                                }
        a thread: waits                           --- Read -------->  Tree.get_range_in, opens     }
        a view of the arena                       <-- Done ---------

Invariants:
- It is of no consequence: it decides nothing, holds nothing that is not in the arena, and whatever it is asked for can be done here, too.
  Where there is none, it has died, or does not answer, everything goes on in threads of this process.
- What it does is done by the same code (storage/sealing.py, storage/hosts/tree.py), on the same bytes: the same nonce never seals anything
  else (I1), and a put it was killed in the middle of is done again.
- It ends with this process, whatever that ends by: its channels are closed then.
- It knows what it is told with each request, keys included, and nothing else: no passphrase, no credentials. Who may look into one of the
  two processes (root, and their user as far as ptrace(2) is allowed; the arena, of /proc/PID/fd, in any case) may look into the other.
- One for each process, however many volumes are open; started when the first large sector is sealed or read.
"""
