# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that reads save images: it knows nothing of Xen, and has nothing but the image and a pipe."""
