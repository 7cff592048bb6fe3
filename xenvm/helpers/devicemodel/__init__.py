# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that starts the device model of an HVM guest, and hears from it that it runs."""
