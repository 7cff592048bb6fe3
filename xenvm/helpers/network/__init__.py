# SPDX-License-Identifier: GPL-2.0-or-later
"""The network process: backend interfaces into bridges."""
