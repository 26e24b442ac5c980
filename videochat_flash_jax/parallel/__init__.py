"""Many devices: the mesh, how arrays are sharded over it, and how the processes of a run agree."""
