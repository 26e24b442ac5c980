"""Many devices: the mesh, what is sharded over which of its axes, and the zigzag order."""
