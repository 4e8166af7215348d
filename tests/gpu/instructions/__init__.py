"""Single instructions on the emulator and on a GPU, compared bit for bit.

`tables` lists instruction forms as data; `kernels` makes PTX of them, one kernel each; `operands` makes their
inputs; `on_emulator` and `on_device` run the same PTX text; `compare` judges; `coverage` says which handlers
of the emulator no form covers, and why. `compare_with_gpu.py`, beside this package, is the program.
"""
