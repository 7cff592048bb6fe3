# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that decompresses kernel images, and holds nothing but two descriptors."""
