"""Fleets: users spread over workers, each of which tunes cohorts; the driver alone knows the store.

`messages` is what driver and worker tell each other, `worker` one worker, `plan` who gets whom, `driver` the loop, and
`crew` the workers on Ray. Only `crew` knows Ray.
"""
