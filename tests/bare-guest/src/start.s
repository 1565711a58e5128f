# Everything that runs in ring 0: the start, and the handlers.

    .equ RING0_CODE, 0x08
    .equ RING3_DATA, 0x18 + 3
    .equ RING3_CODE, 0x20 + 3
    .equ TASK, 0x28
    .equ INTERRUPTS_ENABLED, 0x202
    .equ CR4_OSFXSR_OSXMMEXCPT, 0x600
    .equ LAPIC_EOI, 0xfee000b0
    .equ OUT_DX_AL, 0xee
    .equ HLT, 0xf4

# Entered in long mode with all of memory mapped one to one; rsi holds the address of the zero page.
    .section .text.start, "ax"
    .globl start
start:
    lea rsp, [rip + ring0_stack]
    lea rax, [rip + page_map]
    mov cr3, rax
    # Compiled code uses SSE.
    mov rax, cr4
    or rax, CR4_OSFXSR_OSXMMEXCPT
    mov cr4, rax

    lea rax, [rip + task]
    mov [rip + task_descriptor + 2], ax
    shr rax, 16
    mov [rip + task_descriptor + 4], al
    mov [rip + task_descriptor + 7], ah
    lgdt [rip + gdt_pointer]
    lidt [rip + idt_pointer]
    mov eax, TASK
    ltr ax

    mov rdi, rsi
    push RING3_DATA
    # As after a call: 8 bytes below a multiple of 16.
    lea rax, [rip + ring3_stack - 8]
    push rax
    push INTERRUPTS_ENABLED
    push RING3_CODE
    lea rax, [rip + {main}]
    push rax
    iretq

# Ring 3 may neither write ports nor halt. This handler of the fault does both for it: `out dx, al`
# as it stands, and `hlt` until the counter at rdi is no longer rsi. Interrupts are off but for the
# instruction that halts, so that none comes between the look and the wait. rcx is lost.
    .globl general_protection
general_protection:
    add rsp, 8
    mov rcx, [rsp]
    cmp byte ptr [rcx], OUT_DX_AL
    je 3f
    cmp byte ptr [rcx], HLT
    je 2f
    # Anything else is a mistake, and has no handler.
    ud2
1:  sti
    hlt
    cli
2:  cmp [rdi], rsi
    je 1b
    jmp 4f
3:  out dx, al
4:  inc qword ptr [rsp]
    iretq

# One handler for each interrupt line, 32 bytes apart: counts.
    .globl interrupt_handlers
    .balign 32
interrupt_handlers:
    .set line, 0
    .rept {lines}
    .balign 32
    lock inc qword ptr [rip + {counters} + 8 * line]
    push rax
    mov eax, LAPIC_EOI
    mov dword ptr [rax], 0
    pop rax
    iretq
    .set line, line + 1
    .endr

    .data
    .balign 4096
page_map:
    .quad page_pointers + 7
    .fill 511, 8, 0
page_pointers:
    .quad page_directories + 7
    .quad page_directories + 0x1007
    .quad page_directories + 0x2007
    .quad page_directories + 0x3007
    .fill 508, 8, 0
# 4 GiB in large pages that ring 3 may read, write and run.
page_directories:
    .set page, 0
    .rept 4 * 512
    .quad page + 0x87
    .set page, page + 0x200000
    .endr

    .balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00cff3000000ffff
    .quad 0x00affb000000ffff
task_descriptor:
    .quad 0x0000890000000067
    .quad 0
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad {idt}

    .balign 16
task:
    .long 0
    .quad ring0_stack
    .fill 90, 1, 0
    .word 104

    .bss
    .balign 16
    .skip 0x1000
ring0_stack:
    .skip 0x40000
ring3_stack:
