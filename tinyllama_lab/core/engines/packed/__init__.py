"""Many LoRA adapters in one forward and backward pass of one frozen base.

PEFT runs one adapter at a time: a sweep of 12 trials pays for the frozen base 12 times, each time
with a small batch. This package puts the examples of all trials into common micro-batches. The
base then runs with many tokens at a time, and only the small LoRA matmuls differ between trials. A
trial gets the loss, gradients and dropout masks that it would get alone: up to rounding, and to
the last bit with `train.deterministic`, which keeps every matmul to one adapter.

Shapes. Docstrings use these names:

    tokens    all tokens of a micro-batch, over all sequences and adapters
    size      width of the residual stream (`hidden_size`); in attention, width of one head
    inputs    columns of a weight matrix; `outputs` are its rows
    rank      `lora.r` of an adapter
    labels    supervised tokens, those whose prediction is scored

Token layout (`batch.py`). Sequences lie end to end on one axis, sorted by adapter:

    adapter        |----- r=8 -----|-- r=16 --|- bare base -|
    sequence       |   0    | 1    |    2     |     3       |
    ids [tokens]    t t t t  t t t  t t t t t  t t t t t t t

An `AdapterSpan` is the range of tokens that belongs to one adapter. Tokens of the bare base, such
as those of its own evaluation, belong to no span. There is no padding, because everything but
attention works on single tokens: embedding, norms, linear layers and loss never look at a
neighbour. Padded to the longest, a batch of chats of mixed lengths would spend much of its
compute on tokens that nobody reads.

Attention (`attention.py`, on GPUs `varlen.py`) is the one step where tokens of a sequence meet.
On CPUs it gathers sequences of similar length into padded buckets (at most 1.25 times the
shorter length) and scatters the output back. On GPUs a kernel takes the cumulative lengths.

Linear layers (`linear.py`). Modules with the same input (q, k and v; gate and up) are one frozen
matrix W `[outputs, inputs]`. For the rows of each span, with A `[rank, inputs]`,
B `[outputs, rank]` and `s = scaling`:

    forward     x      = step(source)           # the RMS norm or SwiGLU before the layer
                result = x @ W.T                # one matmul for all tokens
                h      = (x * mask) @ A.T       # of the span's rows alone
                result += s * h @ B.T
    backward    grad_h = s * grad @ B
                grad_B += s * grad.T @ h
                grad_A += grad_h.T @ (x * mask)
                grad_x = grad @ W + (grad_h @ A) * mask
                grad of source = step.backward(grad_x)

W gets no gradient. `x` is not kept for backward but recomputed from `source` (`elementwise.py`),
and of the adapter only `h` is kept. The mask is that of dropout (`dropout.py`): a hash of trial
seed, step, example, token and module, so it does not depend on what else is in the batch. For
adapters with DoRA, `dora.py` then scales the rows of `result`.

On a CPU with a C++ compiler, the matmuls with A and B are loops of `lora_cpu.cpp`, and the
elementwise steps loops of `fused_cpu.cpp`. `fused_cpu.py` compiles and calls both.

On a GPU, `segments.py` replaces the loop over spans: the kernels of `triton_lora.py` take all
adapters and all modules of a linear layer in one launch. The elementwise steps are kernels too
(`fused_gpu.py`, `triton_steps.py`). Tests run the kernels in Triton's interpreter.

The rest: `weights.py` lays frozen weights side by side and dequantizes 4-bit ones; `head.py`
computes the loss of labels in chunks, so that `[labels, vocabulary]` never exists as a whole;
`adapter.py` and `layout.py` hold an adapter as one flat vector, so that clipping and AdamW are a
few kernels; `decode.py` generates tokens with a cache of keys and values; `llama.py` is the
model, and `engine.py` is what the training loop sees.

All of this is the pass of Llama. Other decoders run in transformers' own forward pass
(`any_decoder.py`). Its linear layers are those of `linear.py`, joined where their names say that
they read one input, and its RMS norms those of `elementwise.py`. Attention is that of
`attention.py` or, with sliding windows, capped scores, long rows or on a GPU, of `apart.py`.
`training/pack_check.py` tries all this on a base before it is used.
"""
