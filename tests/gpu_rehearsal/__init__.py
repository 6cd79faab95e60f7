"""A pretended GPU, so that code for GPUs runs on a machine without one.

Its tensors are CUDA tensors to torch: device "cuda", with the dispatch key, the autocast and the autograd of CUDA.
Their memory is the host's, and kernels are those of the CPU. It needs a torch without CUDA, whose place it takes
for the rest of a process:

- `python -m gpu_rehearsal SCRIPT ARGUMENTS` runs a script, with `tests` and `tests/helpers` in PYTHONPATH;
- `python -m pytest -p gpu_rehearsal.plugin FILES` runs tests, those with the mark `gpu` among them.

What it keeps as a GPU does:

- Recording a CUDA graph computes nothing. A replay repeats the kernels in their memory, with the numbers that they
  got while recording. Memory of a recording has no values before its first replay.
- Recordings of one pool share its memory. What is free there is overwritten before each replay.
- A wait of the host while recording is an error, and so is a kernel on the default stream. Others are counted.
- Tensors of two devices do not go together.
- Kernels of fastadv run on a GPU alone where `csrc/cuda` or `kernels` has one.

What it finds that a GPU does not tell: a replay that uses freed memory; a kernel on memory that another stream may
still use; memory that is handed out while another stream may still use it. Such a fault raises an error, and fails
the test also where the code under test catches that.

What it cannot show: kernels of CUDA C++ and Triton, times, cuDNN and its algorithms, TF32, the rounding of a GPU,
kernels that allocate or wait by themselves, several GPUs, NCCL, and copies that a GPU makes late. `torch.compile`
leaves what it gets as it is.
"""
