"""Operations that models are made of. One contract may have several kernels.

| file                 | what it does |
|----------------------|--------------|
| `attention`          | softmax attention: the contract, and the choice of an implementation |
| `blockwise`          | attention in tiles, for CPUs, GPUs and the ring |
| `splash`             | attention by the kernel for TPUs |
| `sharded_attention`  | self-attention of a sequence that may be sharded: ring or all-gather |
| `ring_attention`     | blocks of keys go round a ring; each hop is hidden behind a computation |
| `received_attention` | how much attention each token receives, to rank tokens |
| `rope`               | rotary positions |
| `kv_formats`         | keys and values in a cache: wide, in 8 bits or in 4 bits |
| `swiglu`             | the MLP of the decoder; on a CPU in blocks of rows |
| `linear`             | linear layers, and in which type their gradients are summed |
| `norms`              | normalisation layers |
| `embedding`          | looks up embeddings in a table that may be sharded |
| `gather`             | picks tokens out of rows |
| `sharded_gather`     | picks tokens out of rows that are sharded |
| `precision`          | how exact the products of a program are |
| `platform`           | which kind of device a program is traced for |
"""
