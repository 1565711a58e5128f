//! What the guest's CPUs say about themselves: what KVM supports on this host, with the topology of
//! this VM in place of the host's: one package, a core per CPU, a thread per core.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// `CPUID.1:ECX`: the local APIC timer has TSC-deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// `CPUID.1:ECX`: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// `CPUID.1:EDX`: the number of logical processors in `EBX` counts.
const HTT: u32 = 1 << 28;

/// Kinds of level in leaves 0xb and 0x1f.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The identification of CPU number `cpu` out of `cpus`, from `supported`, KVM's answer to
/// `KVM_GET_SUPPORTED_CPUID`.
pub fn for_cpu(supported: &CpuId, cpu: u8, cpus: u8, tsc_deadline: bool) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        set_topology(entry, cpu, cpus);
        if entry.function == 1 {
            entry.ecx |= HYPERVISOR;
            if tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
        }
    }
    cpuid
}

/// Number of bits of a guest physical address.
pub fn physical_address_bits(supported: &CpuId) -> u32 {
    let leaf = supported
        .as_slice()
        .iter()
        .find(|entry| entry.function == 0x8000_0008);
    // 36 is what processors without the leaf have.
    leaf.map_or(36, |entry| entry.eax & 0xff)
}

fn set_topology(entry: &mut kvm_cpuid_entry2, cpu: u8, cpus: u8) {
    let (id, count) = (u32::from(cpu), u32::from(cpus));
    // Bits of an APIC id that tell the cores of the package apart.
    let id_bits = count.next_power_of_two().trailing_zeros();
    match entry.function {
        // Features and APIC id.
        1 => {
            entry.ebx = entry.ebx & 0x0000_ffff | id << 24 | (1 << id_bits) << 16;
            entry.edx = if cpus > 1 {
                entry.edx | HTT
            } else {
                entry.edx & !HTT
            };
        }
        // Caches (Intel): cores of the package, and CPUs that share the cache: the third level is
        // the package's, the others are the core's own.
        4 if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 >= 3 {
                (1 << id_bits) - 1
            } else {
                0
            };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << id_bits) - 1) << 26;
        }
        // Caches (AMD).
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 >= 3 {
                count - 1
            } else {
                0
            };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
        }
        // Extended topology.
        0xb | 0x1f => {
            let (shift, number, kind) = match entry.index {
                0 => (0, 1, LEVEL_THREAD),
                1 => (id_bits, count, LEVEL_CORE),
                _ => (0, 0, 0),
            };
            entry.flags |= KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
            entry.eax = shift;
            entry.ebx = number;
            entry.ecx = entry.index | kind << 8;
            entry.edx = id;
        }
        // Core count (AMD).
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | id_bits << 12 | (count - 1),
        // Extended APIC id, core id, node (AMD).
        0x8000_001e => {
            entry.eax = id;
            entry.ebx = id;
            entry.ecx = 0;
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let entry = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: 0xffff_ffff,
            ebx: 0xffff_ffff,
            ecx: 0xffff_ffff,
            edx: 0xffff_ffff,
            ..Default::default()
        };
        let mut caches = [entry(4, 0), entry(4, 3)];
        caches[0].eax = 0xfc1f_c121;
        caches[1].eax = 0xfc1f_c163;
        let mut all = vec![entry(1, 0), entry(0xb, 0), entry(0xb, 1), entry(0xb, 2)];
        all.extend(caches);
        all.push(entry(0x8000_0008, 0));
        all[0].ecx = 0;
        CpuId::from_entries(&all).unwrap()
    }

    #[test]
    fn topology_is_that_of_the_vm() {
        let cpuid = for_cpu(&supported(), 5, 6, true);
        let e = cpuid.as_slice();
        assert_eq!(e[0].ebx, 0x0508_ffff);
        assert_eq!(e[0].ecx, HYPERVISOR | TSC_DEADLINE);
        assert_ne!(e[0].edx & HTT, 0);
        assert_eq!((e[1].eax, e[1].ebx, e[1].ecx, e[1].edx), (0, 1, 0x100, 5));
        assert_eq!((e[2].eax, e[2].ebx, e[2].ecx, e[2].edx), (3, 6, 0x201, 5));
        assert_eq!((e[3].eax, e[3].ebx, e[3].ecx, e[3].edx), (0, 0, 2, 5));
        assert_eq!(e[4].eax, 0x1c00_0121);
        assert_eq!(e[5].eax, 0x1c01_c163);
        assert_eq!(e[6].ecx & 0xf0ff, 3 << 12 | 5);

        let cpuid = for_cpu(&supported(), 0, 1, false);
        let e = cpuid.as_slice();
        assert_eq!(e[0].ebx, 0x0001_ffff);
        assert_eq!(e[0].ecx, HYPERVISOR);
        assert_eq!(e[0].edx & HTT, 0);
        assert_eq!((e[2].eax, e[2].ebx), (0, 1));
    }

    #[test]
    fn address_width() {
        assert_eq!(physical_address_bits(&supported()), 0xff);
        assert_eq!(physical_address_bits(&CpuId::new(0).unwrap()), 36);
    }
}
