# From a boot loader (Multiboot, 32 bits) to C++ in 64 bits with all vector registers: nothing else runs on this machine.

.set MAGIC, 0x1badb002
.set FLAGS, 0x00010003          # aligned, memory known, addresses given below

.section .multiboot, "a"
.align 4
header:
    .long MAGIC, FLAGS, -(MAGIC + FLAGS)
    .long header, load_start, load_end, bss_end, start

.section .text
.globl start
.code32
start:
    mov $stack_top, %esp
    # Addresses are places in memory: 512 pages of 2 MiB.
    movl $pages_3 + 3, pages_4
    movl $pages_2 + 3, pages_3
    mov $pages_2, %edi
    mov $0x83, %eax
    mov $512, %ecx
1:  mov %eax, (%edi)
    add $0x200000, %eax
    add $8, %edi
    loop 1b
    mov %cr4, %eax
    or $(1 << 5 | 1 << 9 | 1 << 10 | 1 << 18), %eax  # long addresses, SSE, its exceptions, XSAVE
    mov %eax, %cr4
    mov $pages_4, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax              # long mode
    wrmsr
    mov %cr0, %eax
    and $~(1 << 2), %eax         # no emulation of floating point
    or $(1 << 31 | 1 << 1 | 1), %eax
    mov %eax, %cr0
    lgdt segments
    ljmp $8, $start_64

.code64
start_64:
    mov $16, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    xor %ecx, %ecx
    xor %edx, %edx
    mov $0xe7, %eax              # x87, SSE, AVX, AVX-512
    xsetbv
    mov $stack_top, %rsp
    call check
2:  hlt
    jmp 2b

.align 8
segment_table: .quad 0, 0x00209a0000000000, 0x0000920000000000
segments: .word 23
    .long segment_table

.section .bss
.align 4096
pages_4: .skip 4096
pages_3: .skip 4096
pages_2: .skip 4096
.skip 4 << 20
.align 64
stack_top:

.section .note.GNU-stack, "", @progbits
