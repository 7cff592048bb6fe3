# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that reads config files, without any privilege."""
