# SPDX-License-Identifier: GPL-2.0-or-later
"""What crosses between processes, and what each may do."""
