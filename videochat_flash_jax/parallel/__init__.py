"""Many devices: the mesh, how arrays are sharded over it, and how processes agree.

| file          | what it does |
|---------------|--------------|
| `mesh_config` | the sizes of a mesh |
| `mesh`        | builds the mesh from devices |
| `sharding`    | two tables: how each weight and each activation is sharded |
| `layout`      | the one object that models are handed to run on a mesh |
| `zigzag`      | the order of tokens in which all devices of a ring have equal work |
| `chip_order`  | arranges the chips of a TPU slice so that neighbours are linked |
| `chips`       | published speeds of TPU chips, and the slices that exist |
| `processes`   | starts and ends runs on several hosts |
| `agreement`   | what processes tell each other, so that all continue or all stop |
| `exchange`    | short texts that some processes tell each other, from any thread |
"""
