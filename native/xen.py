# SPDX-License-Identifier: GPL-2.0-or-later
"""Build script of `xenvm._xen`: libxenctrl and libxenguest for the builder, compiled against the installed headers.

The two libraries promise no stable ABI, so the module is built on the host (or for the Xen release) it runs on; one
source serves Xen 4.17 and 4.20 because every struct ends in `...`. Names and meanings are those of xenctrl.h,
xenguest.h and the public headers below xen/.
"""

import os
import re
import subprocess

from cffi import FFI


def _built_for() -> int:
    """Return the Xen release of the libxenctrl to link with, as major << 16 | minor (as XENVER_version answers).

    No header states it; the soname does (libxenctrl.so.4.17).
    """
    compiler = os.environ.get("CC", "cc").split()
    found = subprocess.run(
        [*compiler, "-print-file-name=libxenctrl.so"], check=True, capture_output=True, text=True
    ).stdout.strip()
    match = re.search(r"\.so\.(\d+)\.(\d+)", os.path.realpath(found))
    if match is None:
        raise SystemExit(f"cannot tell the Xen release from {found}: is libxen-dev installed?")
    return int(match[1]) << 16 | int(match[2])


ffibuilder = FFI()

ffibuilder.cdef(
    """
    typedef struct xc_interface_core xc_interface;
    typedef unsigned long xen_pfn_t;

    #define XENVM_BUILT_FOR ...
    #define XEN_DOMINF_dying ...
    #define XEN_DOMINF_shutdown ...
    #define XEN_DOMINF_paused ...
    #define XEN_DOMINF_shutdownmask ...
    #define XEN_DOMINF_shutdownshift ...
    #define XEN_DOMCTL_CDF_hvm ...
    #define XEN_DOMCTL_CDF_hap ...
    #define XEN_X86_EMU_ALL ...
    #define XEN_X86_EMU_VPCI ...
    #define XEN_DOMCTL_SENDTRIGGER_NMI ...
    #define XEN_DOMCTL_SENDTRIGGER_POWER ...
    #define XEN_DOMCTL_SENDTRIGGER_SLEEP ...
    #define HVM_PARAM_CALLBACK_IRQ ...
    #define HVM_PARAM_VIRIDIAN ...
    #define HVM_PARAM_TIMER_MODE ...
    #define HVM_PARAM_HPET_ENABLED ...
    #define HVM_PARAM_ACPI_S_STATE ...
    #define HVM_PARAM_VPT_ALIGN ...
    #define XEN_SYSCTL_PHYSCAP_hvm ...
    #define XEN_SYSCTL_PHYSCAP_hap ...
    #define XEN_SYSCTL_PHYSCAP_pv ...
    #define XEN_SYSCTL_PHYSCAP_gnttab_v2 ...
    #define XENVER_version ...
    #define XC_DOM_PV_CONTAINER ...
    #define XC_DOM_HVM_CONTAINER ...
    #define XEN_CPUID_INPUT_UNUSED ...
    #define XEN_VCPUAFFINITY_HARD ...

    struct xen_arch_domainconfig { uint32_t emulation_flags; ...; };
    struct xen_domctl_createdomain {
        uint8_t handle[16];
        uint32_t flags;
        uint32_t max_vcpus;
        uint32_t max_evtchn_port;
        int32_t max_grant_frames;
        int32_t max_maptrack_frames;
        uint32_t grant_opts;
        struct xen_arch_domainconfig arch;
        ...;
    };
    typedef struct xen_domctl_getdomaininfo {
        uint16_t domain;
        uint32_t flags;
        uint64_t tot_pages;
        uint64_t cpu_time;
        uint32_t nr_online_vcpus;
        uint32_t max_vcpu_id;
        uint8_t handle[16];
        ...;
    } xc_domaininfo_t;
    typedef struct xen_sysctl_physinfo {
        uint32_t capabilities;
        uint64_t free_pages;
        uint64_t scrub_pages;
        uint64_t outstanding_pages;
        ...;
    } xc_physinfo_t;

    xc_interface *xenvm_open(void);
    const char *xenvm_last_error(void);
    void xenvm_clear_error(void);

    int xc_version(xc_interface *xch, int cmd, void *arg);
    int xc_physinfo(xc_interface *xch, xc_physinfo_t *info);
    int xc_domain_create(xc_interface *xch, uint32_t *pdomid, struct xen_domctl_createdomain *config);
    int xc_domain_max_vcpus(xc_interface *xch, uint32_t domid, unsigned int max);
    int xc_domain_setmaxmem(xc_interface *xch, uint32_t domid, uint64_t max_memkb);
    int xc_domain_set_memmap_limit(xc_interface *xch, uint32_t domid, unsigned long map_limitkb);
    int xc_domain_set_tsc_info(xc_interface *xch, uint32_t domid, uint32_t tsc_mode, uint64_t elapsed_nsec,
                               uint32_t gtsc_khz, uint32_t incarnation);
    int xc_evtchn_alloc_unbound(xc_interface *xch, uint32_t dom, uint32_t remote_dom);
    int xc_domain_getinfolist(xc_interface *xch, uint32_t first_domain, unsigned int max_domains,
                              xc_domaininfo_t *info);
    int xc_domain_pause(xc_interface *xch, uint32_t domid);
    int xc_domain_unpause(xc_interface *xch, uint32_t domid);
    int xc_domain_resume(xc_interface *xch, uint32_t domid, int fast);
    int xc_domain_shutdown(xc_interface *xch, uint32_t domid, int reason);
    int xc_domain_destroy(xc_interface *xch, uint32_t domid);
    int xc_domain_send_trigger(xc_interface *xch, uint32_t domid, uint32_t trigger, uint32_t vcpu);
    int xc_domain_set_time_offset(xc_interface *xch, uint32_t domid, int32_t time_offset_seconds);
    int xc_hvm_param_set(xc_interface *xch, uint32_t domid, uint32_t param, uint64_t value);
    int xc_hvm_param_get(xc_interface *xch, uint32_t domid, uint32_t param, uint64_t *value);
    int xc_set_paging_mempool_size(xc_interface *xch, uint32_t domid, uint64_t size);

    struct xc_xend_cpuid { uint32_t leaf, subleaf; char *policy[4]; ...; };
    struct xc_msr;
    int xc_cpuid_apply_policy(xc_interface *xch, uint32_t domid, bool restore, const uint32_t *featureset,
                              unsigned int nr_features, bool pae, bool itsc, bool nested_virt,
                              const struct xc_xend_cpuid *xend, const struct xc_msr *msr);

    typedef uint8_t *xc_cpumap_t;
    int xc_get_cpumap_size(xc_interface *xch);
    int xc_vcpu_setaffinity(xc_interface *xch, uint32_t domid, int vcpu, xc_cpumap_t hard, xc_cpumap_t soft,
                            uint32_t flags);

    struct xc_hvm_firmware_module { uint8_t *data; uint32_t length; uint64_t guest_addr_out; ...; };
    struct xc_dom_image {
        int container_type;
        xen_pfn_t target_pages;
        uint64_t lowmem_end;
        uint64_t highmem_end;
        uint64_t mmio_start;
        uint64_t mmio_size;
        uint64_t vga_hole_size;
        bool device_model;
        struct xc_hvm_firmware_module system_firmware_module;
        struct xc_hvm_firmware_module acpi_modules[...];
        struct xc_hvm_firmware_module smbios_module;
        const char *guest_type;
        xen_pfn_t console_pfn;
        xen_pfn_t xenstore_pfn;
        unsigned long flags;
        unsigned int console_evtchn;
        unsigned int xenstore_evtchn;
        uint32_t console_domid;
        uint32_t xenstore_domid;
        int claim_enabled;
        unsigned int max_vcpus;
        ...;
    };
    struct xc_dom_image *xc_dom_allocate(xc_interface *xch, const char *cmdline, const char *features);
    void xc_dom_release(struct xc_dom_image *dom);
    int xc_dom_module_max_size(struct xc_dom_image *dom, size_t sz);
    int xc_dom_kernel_mem(struct xc_dom_image *dom, const void *mem, size_t memsize);
    int xc_dom_module_mem(struct xc_dom_image *dom, const void *mem, size_t memsize, const char *cmdline);
    int xc_dom_boot_xen_init(struct xc_dom_image *dom, xc_interface *xch, uint32_t domid);
    int xc_dom_parse_image(struct xc_dom_image *dom);
    int xc_dom_mem_init(struct xc_dom_image *dom, unsigned int mem_mb);
    int xc_dom_boot_mem_init(struct xc_dom_image *dom);
    int xc_dom_build_image(struct xc_dom_image *dom);
    int xc_dom_boot_image(struct xc_dom_image *dom);
    int xc_dom_gnttab_init(struct xc_dom_image *dom);
    xen_pfn_t xc_dom_p2m(struct xc_dom_image *dom, xen_pfn_t pfn);

    typedef enum { XC_STREAM_PLAIN, ... } xc_stream_type_t;
    struct save_callbacks {
        int (*suspend)(void *data);
        int (*switch_qemu_logdirty)(uint32_t domid, unsigned int enable, void *data);
        void *data;
        ...;
    };
    #define XCFLAGS_LIVE ...
    #define XGS_POLICY_ABORT ...
    #define XGS_POLICY_CONTINUE_PRECOPY ...
    #define XGS_POLICY_STOP_AND_COPY ...
    struct restore_callbacks { void *data; ...; };
    int xc_domain_save(xc_interface *xch, int io_fd, uint32_t dom, uint32_t flags, struct save_callbacks *callbacks,
                       xc_stream_type_t stream_type, int recv_fd);
    int xc_domain_restore(xc_interface *xch, int io_fd, uint32_t dom, unsigned int store_evtchn,
                          unsigned long *store_mfn, uint32_t store_domid, unsigned int console_evtchn,
                          unsigned long *console_mfn, uint32_t console_domid, xc_stream_type_t stream_type,
                          struct restore_callbacks *callbacks, int send_back_fd);
    extern "Python" int xenvm_suspend(void *data);
    extern "Python" void xenvm_frames(unsigned long done, unsigned long total);
    extern "Python" int xenvm_track(uint32_t domid, unsigned int enable, void *data);
    extern "Python" int xenvm_round(unsigned int round, unsigned long written, long dirty);
    void xenvm_tell_frames(void (*hook)(unsigned long done, unsigned long total));
    void xenvm_ask_rounds(struct save_callbacks *callbacks, int (*hook)(unsigned int, unsigned long, long));
    void xenvm_stop_tracking(xc_interface *xch, uint32_t domid);
    int xenvm_hvm_memory_map(xc_interface *xch, uint32_t domid, struct xc_dom_image *dom);
    int xenvm_hvm_info(xc_interface *xch, uint32_t domid, unsigned int vcpus, bool apic);
    """
)

ffibuilder.set_source(
    "xenvm._xen",
    r"""
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <stdarg.h>
    #include <stdbool.h>
    #include <stdio.h>
    #include <string.h>
    #include <sys/mman.h>
    #define XC_WANT_COMPAT_MAP_FOREIGN_API
    #include <xenctrl.h>
    #include <xen/hvm/hvm_info_table.h>
    #include <xen/hvm/e820.h>
    #include <xen/hvm/params.h>
    #include <xenguest.h>

    /* libxenguest reports the reason of a failure only through its logger (errno stays 0): keep the first error
       line of a call, since later ones only say that the caller gave up too. */
    static char last_error[512];

    static void keep_message(struct xentoollog_logger *logger, xentoollog_level level, int errnoval,
                             const char *context, const char *format, va_list al)
    {
        int length;

        (void)logger; (void)context;
        if (level < XTL_ERROR || last_error[0])
            return;
        length = vsnprintf(last_error, sizeof(last_error), format, al);
        if (errnoval > 0 && length >= 0 && (size_t)length < sizeof(last_error))
            snprintf(last_error + length, sizeof(last_error) - length, ": %s", strerror(errnoval));
    }

    static void (*frames_hook)(unsigned long done, unsigned long total);

    static void tell_progress(struct xentoollog_logger *logger, const char *context, const char *doing_what,
                              int percent, unsigned long done, unsigned long total)
    {
        (void)logger; (void)context; (void)percent;
        if (frames_hook && doing_what && !strncmp(doing_what, "Frames", 6))
            frames_hook(done, total);
    }

    static void no_destroy(struct xentoollog_logger *logger) { (void)logger; }

    static struct xentoollog_logger keeper = {
        .vmessage = keep_message, .progress = tell_progress, .destroy = no_destroy,
    };

    /* Both loggers given: with a null dombuild_logger libxenctrl opens a log file of its own. */
    static xc_interface *xenvm_open(void) { return xc_interface_open(&keeper, &keeper, 0); }
    static const char *xenvm_last_error(void) { return last_error; }
    static void xenvm_clear_error(void) { last_error[0] = 0; }
    static void xenvm_tell_frames(void (*hook)(unsigned long, unsigned long)) { frames_hook = hook; }

    /* What is asked before each round over the memory of a guest that still runs; its argument comes by value. */
    static int (*round_hook)(unsigned int, unsigned long, long);

    static int precopy(struct precopy_stats stats, void *data)
    {
        (void)data;
        return round_hook(stats.iteration, stats.total_written, stats.dirty_count);
    }

    static void xenvm_ask_rounds(struct save_callbacks *callbacks, int (*hook)(unsigned int, unsigned long, long))
    {
        round_hook = hook;
        callbacks->precopy_policy = precopy;
    }

    /* Whether it was on or not: what a builder that has died had switched on. */
    static void xenvm_stop_tracking(xc_interface *xch, uint32_t domid)
    {
        (void)xc_logdirty_control(xch, domid, XEN_DOMCTL_SHADOW_OP_OFF, NULL, 0, 0, NULL);
    }

    /* The guest's memory map: RAM from 1 MiB on; what is below hvmloader describes. The builder copies it later. */
    static int xenvm_hvm_memory_map(xc_interface *xch, uint32_t domid, struct xc_dom_image *dom)
    {
        static struct e820entry map[2];
        unsigned int entries = 1;

        map[0].addr = 0x100000;
        map[0].size = dom->lowmem_end - 0x100000;
        map[0].type = E820_RAM;
        if (dom->highmem_end) {
            map[1].addr = UINT64_C(1) << 32;
            map[1].size = dom->highmem_end - (UINT64_C(1) << 32);
            map[1].type = E820_RAM;
            entries = 2;
        }
        if (xc_domain_set_memory_map(xch, domid, map, entries) < 0)
            return -1;
        dom->e820 = map;
        dom->e820_entries = entries;
        return 0;
    }

    /* libxenguest fills the table that hvmloader reads for one vcpu with an APIC: xen/hvm/hvm_info_table.h. */
    static int xenvm_hvm_info(xc_interface *xch, uint32_t domid, unsigned int vcpus, bool apic)
    {
        uint8_t *page = xc_map_foreign_range(xch, domid, 4096, PROT_READ | PROT_WRITE, HVM_INFO_PFN), sum = 0;
        struct hvm_info_table *table;
        uint32_t at;

        if (page == NULL)
            return -1;
        table = (struct hvm_info_table *)(page + HVM_INFO_OFFSET);
        if (table->length < sizeof(*table) || table->length > 4096 - HVM_INFO_OFFSET) {
            munmap(page, 4096);
            errno = EPROTO;
            return -1;
        }
        table->nr_vcpus = vcpus;
        table->apic_mode = apic;
        for (at = 0; at < table->length; at++)
            sum += ((uint8_t *)table)[at];
        table->checksum -= sum;
        munmap(page, 4096);
        return 0;
    }
    """,
    define_macros=[("XENVM_BUILT_FOR", str(_built_for()))],
    libraries=["xenguest", "xenctrl", "xentoollog"],
    extra_compile_args=["-Werror=incompatible-pointer-types"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
