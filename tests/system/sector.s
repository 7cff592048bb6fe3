# SPDX-License-Identifier: GPL-2.0-or-later
# A boot sector that is a guest as soon as the firmware is done. On the first serial port it says GUEST-UP, what the
# processor is (CPUID 1 edx, 80000001 edx, 40000000 ebx), hour and minute of its clock, then "tick 1" and a count, four
# times a second, and GUEST-NMI when an NMI has come. When its power button is pressed (PM1a status in port 0xb000,
# control in 0xb004) it asks for S5, and for S3 when it is the sleep button (bit 9). Until it sleeps it tells the firmware
# again and again that it is to jump through 0040:0067 when it is reset (CMOS 0x0f, where the device model writes that the
# resume is ACPI's): so it says GUEST-WOKE, and has no interrupts then, but its power button.
#
# It does what it is told by a letter on the serial port:
#   d   say DRIVE, number and the 8 letters at byte 512 for each disk that the firmware has (80 and on), then END
#   f   triple fault      r   reset by the keyboard's controller      o   S5      i   ignore the buttons
#
#     as --32 -o sector.o sector.s && ld -m elf_i386 --oformat binary -Ttext 0x7c00 -o sector.bin sector.o
        .code16
        .globl _start
_start: xorw %ax, %ax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %ss
        movw $0x7c00, %sp
        movw $nmi, 8
        movw %ax, 10
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
        movw %dx, %bp
poll:   movw $0xb000, %dx
        inw %dx, %ax
        andb heeded, %ah
        testb $1, %ah
        jnz off
        testb $2, %ah
        jnz sleep
        testb $0xff, nmis
        jz 1f
        movb $0, nmis
        movw $nmied, %si
        call say
1:      movw $0x3fd, %dx
        inb %dx, %al
        testb $1, %al
        jz 1f
        movb $0xf8, %dl
        inb %dx, %al
        cmpb $'d', %al
        je drives
        cmpb $'f', %al
        je fault
        cmpb $'r', %al
        je reboot
        cmpb $'o', %al
        je off
        cmpb $'i', %al
        jne 1f
        movb $0, heeded
1:      movb $0, %ah
        int $0x1a
        subw %bp, %dx
        cmpw $4, %dx
        jb poll
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
        movw $0xb000, %dx
1:      inw %dx, %ax
        testb $1, %ah
        jz 1b
        jmp off

reboot: movb $0xfe, %al
        outb %al, $0x64
        jmp reboot

fault:  lidt none
        int3

nmi:    movb $1, %cs:nmis
        iret

drives: movw $0x80, %di
1:      movw $1, packet + 2
        movw %di, %dx
        movb $0x42, %ah
        movw $packet, %si
        int $0x13
        jc 2f
        movw $drive, %si
        call say
        movzwl %di, %eax
        call hex
        movw $0x8001, %si
        movb $' ', (%si)
        movb $0, 9(%si)
        call say
        movw $line, %si
        call say
2:      incw %di
        cmpw $0x88, %di
        jne 1b
        movw $end, %si
        call say
        jmp wait

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
woke:   .ascii "GUEST-WOKE"
line:   .asciz "\r\n"
nmied:  .asciz "GUEST-NMI\r\n"
drive:  .asciz "DRIVE"
end:    .asciz "END\r\n"
tick:   .asciz "tick 1"
heeded: .byte 3                 # the buttons
nmis:   .byte 0
none:   .word 0                 # an empty table of interrupts, and what follows it
count:  .long 0
packet: .byte 16, 0             # int 0x13, function 0x42: a block from sector 1 to 0000:8002
        .word 1, 0x8002, 0
        .quad 1

        .org 510
        .word 0xaa55
