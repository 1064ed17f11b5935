"""The model: layers, attention kernels, losses, low-precision products. No files, no printing, no
loop.
"""
