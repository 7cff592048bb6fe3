# SPDX-License-Identifier: GPL-2.0-or-later

"""Build script of `xenvm._confine`: the kernel calls behind xenvm.boundary.confine that Python lacks.

Every function returns -errno on failure. Constants that the kernel headers of Debian 12 (linux-libc-dev 6.1) lack are
defined here from include/uapi/linux/landlock.h and arch/x86/entry/syscalls/syscall_64.tbl of later kernels.
"""

from cffi import FFI

# Every system call of x86_64, so that a list of names never meets one which the filter does not know.
_SYSCALLS = """
    _sysctl accept accept4 access acct add_key adjtimex afs_syscall alarm arch_prctl bind bpf brk capget capset chdir
    chmod chown chroot clock_adjtime clock_getres clock_gettime clock_nanosleep clock_settime clone clone3 close
    close_range connect copy_file_range creat create_module delete_module dup dup2 dup3 epoll_create epoll_create1
    epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit
    exit_group faccessat faccessat2 fadvise64 fallocate fanotify_init fanotify_mark fchdir fchmod fchmodat fchown
    fchownat fcntl fdatasync fgetxattr finit_module flistxattr flock fork fremovexattr fsconfig fsetxattr fsmount
    fsopen fspick fstat fstatfs fsync ftruncate futex futex_waitv futimesat get_kernel_syms get_mempolicy
    get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer
    getpeername getpgid getpgrp getpid getpmsg getppid getpriority getrandom getresgid getresuid getrlimit getrusage
    getsid getsockname getsockopt gettid gettimeofday getuid getxattr init_module inotify_add_watch inotify_init
    inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit io_uring_enter
    io_uring_register io_uring_setup ioctl ioperm iopl ioprio_get ioprio_set kcmp kexec_file_load kexec_load keyctl
    kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lgetxattr link linkat listen
    listxattr llistxattr lookup_dcookie lremovexattr lseek lsetxattr lstat madvise mbind membarrier memfd_create
    memfd_secret migrate_pages mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap modify_ldt mount
    mount_setattr move_mount move_pages mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend
    mq_unlink mremap msgctl msgget msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep
    newfstatat nfsservctl open open_by_handle_at open_tree open_tree_attr openat openat2 pause perf_event_open
    personality pidfd_getfd pidfd_open pidfd_send_signal pipe pipe2 pivot_root pkey_alloc pkey_free pkey_mprotect
    poll ppoll prctl pread64 preadv preadv2 prlimit64 process_madvise process_mrelease process_vm_readv
    process_vm_writev pselect6 ptrace putpmsg pwrite64 pwritev pwritev2 query_module quotactl quotactl_fd read
    readahead readlink readlinkat readv reboot recvfrom recvmmsg recvmsg remap_file_pages removexattr rename renameat
    renameat2 request_key restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo
    rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min
    sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity
    sched_setattr sched_setparam sched_setscheduler sched_yield seccomp security select semctl semget semop semtimedop
    sendfile sendmmsg sendmsg sendto set_mempolicy set_mempolicy_home_node set_robust_list set_thread_area
    set_tid_address setdomainname setfsgid setfsuid setgid setgroups sethostname setitimer setns setpgid setpriority
    setregid setresgid setresuid setreuid setrlimit setsid setsockopt settimeofday setuid setxattr shmat shmctl shmdt
    shmget shutdown sigaltstack signalfd signalfd4 socket socketpair splice stat statfs statx swapoff swapon symlink
    symlinkat sync sync_file_range syncfs sysfs sysinfo syslog tee tgkill time timer_create timer_delete
    timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime times tkill truncate
    tuxcall umask umount2 uname unlink unlinkat unshare uselib userfaultfd ustat utime utimensat utimes vfork vhangup
    vmsplice vserver wait4 waitid write writev
"""

CDEF = """
struct sock_filter { uint16_t code; uint8_t jt; uint8_t jf; uint32_t k; };

#define BPF_LD ...
#define BPF_W ...
#define BPF_ABS ...
#define BPF_JMP ...
#define BPF_JEQ ...
#define BPF_JGE ...
#define BPF_JSET ...
#define BPF_K ...
#define BPF_RET ...
#define BPF_MAXINSNS ...
static const unsigned int AUDIT_ARCH_X86_64;
static const unsigned int X32_SYSCALL_BIT;
static const unsigned int SECCOMP_RET_KILL_PROCESS;
static const unsigned int SECCOMP_RET_ERRNO;
static const unsigned int SECCOMP_RET_USER_NOTIF;
static const unsigned int SECCOMP_RET_ALLOW;
static const unsigned int OFFSET_NR;
static const unsigned int OFFSET_ARCH;
static const unsigned int OFFSET_ARGS;

int xenvm_syscall_number(const char *name);
long xenvm_syscall(long number, long a, long b, long c, long d, long e, long f);
int xenvm_close_range(unsigned int first, unsigned int last);
int xenvm_set_capabilities(uint64_t mask);
int xenvm_drop_bounding(int capability);
int xenvm_clear_ambient(void);
int xenvm_landlock_abi(void);
int xenvm_landlock_create(int abi);
int xenvm_landlock_allow(int ruleset, int abi, const char *path);
int xenvm_landlock_enter(int ruleset);
int xenvm_landlock_deny_all(int abi);
int xenvm_install_filter(struct sock_filter *instructions, unsigned short count);
int xenvm_install_listener(struct sock_filter *instructions, unsigned short count);
"""

_NAMES = "\n".join(
    f'#ifdef __NR_{name}\n    {{ "{name}", __NR_{name} }},\n#else\n    {{ "{name}", -1 }},\n#endif'
    for name in _SYSCALLS.split()
)

SOURCE = (
    r"""
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>

#if !defined(__x86_64__) || defined(__ILP32__)
#error "the system call filter is written for x86_64"
#endif

/* syscall_64.tbl of Linux 6.15 */
#ifndef __NR_open_tree_attr
#define __NR_open_tree_attr 467
#endif

/* asm/unistd.h calls it __X32_SYSCALL_BIT, with a suffix that differs between versions */
#define X32_SYSCALL_BIT 0x40000000u

#define OFFSET_NR ((unsigned int)offsetof(struct seccomp_data, nr))
#define OFFSET_ARCH ((unsigned int)offsetof(struct seccomp_data, arch))
/* eight bytes each; x86_64 stores the low half first */
#define OFFSET_ARGS ((unsigned int)offsetof(struct seccomp_data, args))

static const struct { const char *name; int number; } xenvm_names[] = {
"""
    + _NAMES
    + r"""
};

/* The number of a system call; -1: this kernel's headers lack it; -2: no such name in the list. */
static int xenvm_syscall_number(const char *name)
{
    size_t i;

    for (i = 0; i < sizeof xenvm_names / sizeof xenvm_names[0]; i++)
        if (strcmp(xenvm_names[i].name, name) == 0)
            return xenvm_names[i].number;
    return -2;
}

/* Any system call, for probes: past glibc, so that the filter alone answers. */
static long xenvm_syscall(long number, long a, long b, long c, long d, long e, long f)
{
    long result = syscall(number, a, b, c, d, e, f);

    return result < 0 ? -errno : result;
}

/* Close the descriptors first to last, both included; needs Linux 5.9. */
static int xenvm_close_range(unsigned int first, unsigned int last)
{
    return syscall(__NR_close_range, first, last, 0) < 0 ? -errno : 0;
}

/* Permitted and effective become mask, inheritable becomes empty: one call, so no order between the sets matters. */
static int xenvm_set_capabilities(uint64_t mask)
{
    struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3, .pid = 0 };
    struct __user_cap_data_struct data[2];

    memset(data, 0, sizeof data);
    data[0].effective = data[0].permitted = (uint32_t)mask;
    data[1].effective = data[1].permitted = (uint32_t)(mask >> 32);
    return syscall(__NR_capset, &header, data) < 0 ? -errno : 0;
}

/* For capabilities newer than the headers python-prctl was built with; -EINVAL: the kernel has no such one. */
static int xenvm_drop_bounding(int capability)
{
    return prctl(PR_CAPBSET_DROP, (unsigned long)capability, 0UL, 0UL, 0UL) < 0 ? -errno : 0;
}

static int xenvm_clear_ambient(void)
{
    return prctl(PR_CAP_AMBIENT, (unsigned long)PR_CAP_AMBIENT_CLEAR_ALL, 0UL, 0UL, 0UL) < 0 ? -errno : 0;
}

/* The version of Landlock in the running kernel; 0: not built in, or not switched on. */
static int xenvm_landlock_abi(void)
{
    long abi = syscall(__NR_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);

    if (abi < 0)
        return errno == ENOSYS || errno == EOPNOTSUPP ? 0 : -errno;
    return (int)abi;
}

/*
 * A ruleset that handles every access the given version knows, and allows none yet; a descriptor. Rights and sizes are
 * those of linux/landlock.h: file rights 0 to 12 from version 1, REFER 2, TRUNCATE 3, IOCTL_DEV 5, RESOLVE_UNIX 9; TCP
 * bind and connect 4; scopes for abstract sockets and signals 6. A kernel takes a longer structure whose unknown end is
 * zero.
 */
static int xenvm_landlock_create(int abi)
{
    struct { uint64_t fs, net, scoped; } rules = { 0, 0, 0 };
    long fd;

    rules.fs = (UINT64_C(1) << 13) - 1;
    if (abi >= 2)
        rules.fs |= UINT64_C(1) << 13;
    if (abi >= 3)
        rules.fs |= UINT64_C(1) << 14;
    if (abi >= 5)
        rules.fs |= UINT64_C(1) << 15;
    if (abi >= 9)
        rules.fs |= UINT64_C(1) << 16;
    if (abi >= 4)
        rules.net = 3;
    if (abi >= 6)
        rules.scoped = 3;
    fd = syscall(__NR_landlock_create_ruleset, &rules, sizeof rules, 0);
    return fd < 0 ? -errno : (int)fd;
}

/*
 * Allow to read and run a file, or all below a directory (of /dev to write too), to read, write and control a character
 * device, or to connect to a socket; a path that does not exist is passed over.
 */
static int xenvm_landlock_allow(int ruleset, int abi, const char *path)
{
    struct landlock_path_beneath_attr rule = {
        .allowed_access = LANDLOCK_ACCESS_FS_EXECUTE | LANDLOCK_ACCESS_FS_READ_FILE,
    };
    struct stat found;
    int result = 0;

    rule.parent_fd = open(path, O_PATH | O_CLOEXEC);
    if (rule.parent_fd < 0)
        return errno == ENOENT ? 0 : -errno;
    if (fstat(rule.parent_fd, &found) < 0)
        result = -errno;
    else if (S_ISDIR(found.st_mode))
        rule.allowed_access |= LANDLOCK_ACCESS_FS_READ_DIR;
    if (S_ISCHR(found.st_mode) || strncmp(path, "/dev/", 5) == 0)
        rule.allowed_access = LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_WRITE_FILE |
                              (abi >= 5 ? UINT64_C(1) << 15 : 0);
    else if (S_ISSOCK(found.st_mode))
        rule.allowed_access = abi >= 9 ? UINT64_C(1) << 16 : 0;
    if (rule.allowed_access == 0) {
        close(rule.parent_fd);
        return result;
    }
    if (result == 0 && syscall(__NR_landlock_add_rule, ruleset, LANDLOCK_RULE_PATH_BENEATH, &rule, 0) < 0)
        result = -errno;
    close(rule.parent_fd);
    return result;
}

/* Enter the domain of a ruleset, and close it. Needs no_new_privs. */
static int xenvm_landlock_enter(int ruleset)
{
    int result = syscall(__NR_landlock_restrict_self, ruleset, 0) < 0 ? -errno : 0;

    close(ruleset);
    return result;
}

static int xenvm_landlock_deny_all(int abi)
{
    int ruleset = xenvm_landlock_create(abi);

    return ruleset < 0 ? ruleset : xenvm_landlock_enter(ruleset);
}

/* Needs no_new_privs. The filter then holds for every thread of the process; a positive result names one it missed. */
static int xenvm_install_filter(struct sock_filter *instructions, unsigned short count)
{
    struct sock_fprog program = { .len = count, .filter = instructions };
    long result = syscall(__NR_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program);

    return result < 0 ? -errno : (int)result;
}

/* A further filter for this thread and what it starts; the result hears of each SECCOMP_RET_USER_NOTIF. */
static int xenvm_install_listener(struct sock_filter *instructions, unsigned short count)
{
    struct sock_fprog program = { .len = count, .filter = instructions };
    long result = syscall(__NR_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);

    return result < 0 ? -errno : (int)result;
}
"""
)

ffibuilder = FFI()
ffibuilder.cdef(CDEF)
ffibuilder.set_source("xenvm._confine", SOURCE, extra_compile_args=["-O2", "-Wall", "-Wextra"])

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
