# SPDX-License-Identifier: GPL-2.0-or-later
"""The worker that serves an image file over NBD."""
