"""Two more processes of this program: one seals and opens, the other puts on disks and reads from them, beside the event loop.

Why: an interpreter has one lock, and each system call and each block that is sealed lets it go and takes it back. Threads that sealed and
put sectors so kept the event loop waiting for as long as it worked (docs/performance.md). A process of its own has its own lock.

Vocabulary: the *arena* is memory all of them see, from which large buffers are lent; a *place* is where in it something stands; a
*channel* is a socket on which one thing at a time is asked for here, and one thread there answers.

      this process                                              SEALING (serve)
        event loop: plaintext stands in the arena - Seal ------>  seals it, in the arena
                                                                DISKS (serve)
                  lets the host go on             - Put ------->  Tree.put, out of the arena      } no lock shared with the event loop
                  it is not wanted any more     ==> a flag
                  goes on with others             - Read ------>  Tree.get_range_in, opens, into the arena
                  a view of the arena           <-- Done -------
        a thread, where no Done comes soon, it fails, or nobody waits any more: waits, and sees to what is to be done then

Invariants:
- They are of no consequence: they decide nothing, hold nothing that is not in the arena, and whatever they are asked for can be done here,
  too. Where there is none, it has died, or does not answer, everything goes on in threads of this process.
- What they do is done by the same code (storage/sealing.py, storage/hosts/tree.py), on the same bytes: the same nonce never seals anything
  else (I1), and a put one was killed in the middle of is done again.
- They end with this process, whatever that ends by: their channels are closed then.
- They know what they are told with each request, keys included, and nothing else: no passphrase, no credentials. Who may look into one of
  the processes (root, and their user as far as ptrace(2) is allowed; the arena, by /proc/PID/fd, in any case) may look into the others.
- They keep off the core on which the event loop is at work (`aside`).
- Two for each process, however many volumes are open; started with a mount, or else with the first large sector.

    arena      memory all of them see                   wire      what they tell each other
    client     starts one, asks it, and notices when it is gone; `process` is what was started, from its start to its end, and `asked`
               what it was asked for and has not answered
    sealer, disks     clients: what each of the two is asked for, and what stands in for an answer
    pair       the arena and the two of this process
    serve      their own side, `aside`: on which cores; `__main__`: how it begins
"""
