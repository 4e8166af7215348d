"""What the emulator watches a kernel for, one module for each rule that takes more than a line.

observer, actor: watching memory, and who executes now at which PTX line. barriers: phases of mbarriers that
waiters miss, initialisation that the async proxy may not see. tensor_maps: maps that are edited while or
before they are used. livelock: proof that nothing changes any more. dependents: accesses of grids that
overlap (programmatic dependent launch). races: accesses of shared memory that nothing orders; clocks, order
and shadow are what it stands on.

Bounds, alignment and initialised bytes are checked where memory is accessed (memory, spaces), counts and
transactions of barriers where they change (cta), deadlocks where nothing can run (scheduler).
"""
