# SPDX-License-Identifier: GPL-2.0-or-later
"""The programs: xenvm, xenvm-cmd, xenvm-audit."""
