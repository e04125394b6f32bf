"""The agent's part in stage 2: it finds out whether the system that started is healthy, and says so.

It knows what the initrd left in `/run/calve`, what must hold (`contract.health`), and what follows: the launch hook
completed and the system remembered as good, or the reason told and the machine ended. It runs once a boot and leaves
nothing in memory. Types: `Probe` (tries what must hold), `Outcome` (what the service manager is to do).
"""
