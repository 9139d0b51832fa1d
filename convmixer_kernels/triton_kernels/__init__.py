# SPDX-License-Identifier: MIT
"""Triton kernels of the operators; importing a module of kernels imports triton, importing this package does not."""
