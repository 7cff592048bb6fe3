# SPDX-License-Identifier: GPL-2.0-or-later
"""The worker that makes kernel block devices."""
