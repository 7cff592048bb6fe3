# SPDX-License-Identifier: GPL-2.0-or-later
# A boot sector that is a guest as soon as the firmware is done. On the first serial port it says GUEST-UP, what the
# processor is (CPUID 1 edx, 80000001 edx, 40000000 ebx), the hour of its clock, then "tick 1" and a count, four times a second. When
# its power button is pressed (PM1a status in port 0xb000, control in 0xb004) it asks for S5, and for S3 when it is the
# sleep button (bit 9). Until it sleeps it tells the firmware again and again that it is to jump through 0040:0067 when it
# is reset (CMOS 0x0f, where the device model writes that the resume is ACPI's): so it says GUEST-WOKE, and has no
# interrupts then, but its power button. The byte `mode`, when not 0, has it reset itself through the keyboard's
# controller instead of ticking.
#
#     as --32 -o sector.o sector.s && ld -m elf_i386 --oformat binary -Ttext 0x7c00 -o sector.bin sector.o
        .code16
        .globl _start
_start: xorw %ax, %ax
        movw %ax, %ds
        movw %ax, %ss
        movw $0x7c00, %sp
        sti
        movw $up, %si
        call say
        movl $1, %eax
        cpuid
        movl %edx, %eax
        call hex
        movl $0x80000001, %eax
        cpuid
        movl %edx, %eax
        call hex
        movl $0x40000000, %eax
        cpuid
        movl %ebx, %eax
        call hex
        movb $2, %ah
        int $0x1a
        movzwl %cx, %eax
        call hex
        movw $line, %si
        call say

wait:   movb $0, %ah
        int $0x1a
        movw %dx, %bx
poll:   movw $0xb000, %dx
        inw %dx, %ax
        testb $1, %ah
        jnz off
        testb $2, %ah
        jnz sleep
        movb $0, %ah
        int $0x1a
        subw %bx, %dx
        cmpw $4, %dx
        jb poll
        cmpb $0, mode
        jne reboot
        movw $tick, %si
        call say
        incl count
        movl count, %eax
        call hex
        movw $line, %si
        call say
        jmp wait

off:    movw $0xb004, %dx
        movw $0x2000, %ax
        outw %ax, %dx
        jmp off

sleep:  cli
        movw $woken, 0x467
        movw $0, 0x469
        movw $0xb004, %dx
        movw $0x2400, %ax
        outw %ax, %dx
1:      movb $0x0f, %al
        outb %al, $0x70
        movb $0x0a, %al
        outb %al, $0x71
        jmp 1b

woken:  xorw %ax, %ax
        movw %ax, %ds
        movw %ax, %ss
        movw $0x7c00, %sp
        movw $woke, %si
        call say
        movw $line, %si
        call say
        movw $0xb000, %dx
1:      inw %dx, %ax
        testb $1, %ah
        jz 1b
        jmp off

reboot: movb $0xfe, %al
        outb %al, $0x64
        jmp reboot

say:    movw $0x3f8, %dx
1:      lodsb
        testb %al, %al
        jz 2f
        outb %al, %dx
        jmp 1b
2:      ret

hex:    movw $0x3f8, %dx
        movl %eax, %ebx
        movb $' ', %al
        outb %al, %dx
        movw $8, %cx
1:      roll $4, %ebx
        movb %bl, %al
        andb $15, %al
        addb $'0', %al
        cmpb $'9', %al
        jbe 2f
        addb $39, %al
2:      outb %al, %dx
        loop 1b
        ret

up:     .asciz "GUEST-UP"
line:   .asciz "\r\n"
woke:   .asciz "GUEST-WOKE"
tick:   .asciz "tick 1"
count:  .long 0

        .org 509
mode:   .byte 0
        .word 0xaa55
