"""Runs the kernels of csrc/cuda on the CPU: g++ compiles them against `emulator.h`, which stands in for nvcc.

The threads of a block are switched at its barriers and shuffles, in random order. So the tests see what a kernel
computes, where it reads and writes, and whether a barrier is missing; they do not see what only hardware has:
the model of memory between threads that no barrier orders, and times.
"""
