"""How weights change: groups, schedule, clipping, loss scale."""
