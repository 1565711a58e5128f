//! Loading of the kernel: which kind of file it is, whether it fits, where the CPU begins.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD};
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader, PvhBootCapability};
use tandem_devices::GuestMemory;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::layout;
use crate::memory;

/// A kernel in guest memory.
#[derive(Debug, Clone, Copy)]
pub struct Kernel {
    /// Where and how it is entered.
    pub protocol: Protocol,
    /// First address that the kernel does not need while it starts: an initrd may lie here.
    pub end: u64,
    /// Last address that an initrd may take.
    pub initrd_last: u64,
}

/// How a kernel is entered.
#[derive(Debug, Clone, Copy)]
pub enum Protocol {
    /// Linux 64-bit boot protocol: long mode, `rsi` holds the address of the zero page.
    Linux64 {
        /// First instruction.
        entry: u64,
        /// What the zero page begins with.
        header: setup_header,
    },
    /// PVH: 32-bit protected mode without paging, `ebx` holds the address of the start info.
    Pvh {
        /// First instruction.
        entry: u64,
    },
}

/// Why a kernel or an initrd cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A system call failed.
    #[error("could not read '{}': {source}", file.display())]
    Read {
        /// Kernel or initrd.
        file: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Neither of the two kinds.
    #[error(
        "kernel '{}' is neither an ELF file (vmlinux) nor a bzImage (vmlinuz)",
        file.display()
    )]
    Kind {
        /// The kernel.
        file: PathBuf,
    },
    /// The file contradicts itself or cannot be booted.
    #[error("kernel '{}': {reason}", file.display())]
    Invalid {
        /// The kernel.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Too little RAM.
    #[error(
        "the guest has {} MiB of memory, its kernel{} at least {} MiB: give it more with --memory",
        have >> 20,
        if *initrd { " and initrd need" } else { " needs" },
        need.div_ceil(1 << 20)
    )]
    Memory {
        /// Low RAM in bytes.
        have: u64,
        /// Bytes needed.
        need: u64,
        /// Whether an initrd is counted in.
        initrd: bool,
    },
}

type Result<T> = std::result::Result<T, KernelError>;

/// Bits and numbers of the Linux boot protocol, `Documentation/arch/x86/boot.rst`.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const HEADER_OFFSET: u64 = 0x1f1;
const VERSION_WITH_XLOADFLAGS: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
/// What the protocol gives as limit for kernels that do not name one.
const INITRD_LAST: u64 = 0x7fff_ffff;

const ELF_CLASS_64: u8 = 2;
const ELF_MACHINE_X86_64: u16 = 62;

impl Kernel {
    /// Loads the kernel at `path` into `mem`.
    pub fn load(mem: &GuestMemory, path: &Path) -> Result<Self> {
        let source = Source::open(path)?;
        if source.starts_with(b"\x7fELF")? {
            return source.load_elf(mem);
        }
        match source.setup_header()? {
            Some(header) => source.load_bzimage(mem, header),
            None => Err(KernelError::Kind {
                file: path.to_owned(),
            }),
        }
    }
}

/// Copies the file at `path` to the top of low RAM, above `kernel`. Returns its address and size.
pub fn load_initrd(mem: &GuestMemory, kernel: &Kernel, path: &Path) -> Result<(u64, u64)> {
    let mut source = Source::open(path)?;
    let size = source.size;
    let end = memory::low_end(mem).min(kernel.initrd_last + 1);
    let address = end
        .checked_sub(size)
        .map(|address| address & !0xfff)
        .filter(|address| *address >= kernel.end)
        .ok_or(KernelError::Memory {
            have: memory::low_end(mem),
            need: kernel.end.saturating_add(size.next_multiple_of(4096)),
            initrd: true,
        })?;
    memory::expect_writes(mem, address, size);
    mem.read_exact_volatile_from(GuestAddress(address), &mut source.file, size as usize)
        .map_err(|e| source.read_error(io::Error::other(e)))?;
    Ok((address, size))
}

/// A file to load from.
struct Source<'a> {
    path: &'a Path,
    file: File,
    size: u64,
}

impl<'a> Source<'a> {
    fn open(path: &'a Path) -> Result<Self> {
        let open = || {
            let file = File::open(path)?;
            let metadata = file.metadata()?;
            if !metadata.is_file() {
                return Err(io::Error::other("not a regular file"));
            }
            Ok((file, metadata.len()))
        };
        let (file, size) = open().map_err(|source| KernelError::Read {
            file: path.to_owned(),
            source,
        })?;
        Ok(Self { path, file, size })
    }

    fn read_error(&self, source: io::Error) -> KernelError {
        KernelError::Read {
            file: self.path.to_owned(),
            source,
        }
    }

    fn invalid(&self, reason: impl Into<String>) -> KernelError {
        KernelError::Invalid {
            file: self.path.to_owned(),
            reason: reason.into(),
        }
    }

    fn starts_with(&self, magic: &[u8; 4]) -> Result<bool> {
        let mut start = [0; 4];
        match self.file.read_exact_at(&mut start, 0) {
            Ok(()) => Ok(start == *magic),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(e) => Err(self.read_error(e)),
        }
    }

    /// The header of a bzImage, if this is one.
    fn setup_header(&self) -> Result<Option<setup_header>> {
        let mut header = setup_header::default();
        match self
            .file
            .read_exact_at(header.as_mut_slice(), HEADER_OFFSET)
        {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(e) => return Err(self.read_error(e)),
        }
        Ok((header.boot_flag == BOOT_FLAG && header.header == HEADER_MAGIC).then_some(header))
    }

    fn load_bzimage(mut self, mem: &GuestMemory, header: setup_header) -> Result<Kernel> {
        let xloadflags = header.xloadflags;
        if header.version < VERSION_WITH_XLOADFLAGS || xloadflags & XLF_KERNEL_64 == 0 {
            return Err(self.invalid("has no 64-bit entry point: only x86-64 kernels can be run"));
        }
        // The kernel unpacks itself to `pref_address` and needs `init_size` bytes there; it is
        // loaded below, and moves itself if the two collide.
        let end = layout::KERNEL
            .max(header.pref_address)
            .saturating_add(u64::from(header.init_size))
            .max(layout::KERNEL.saturating_add(self.size));
        check_memory(mem, end)?;
        let loaded = BzImage::load(
            mem,
            Some(GuestAddress(layout::KERNEL)),
            &mut self.file,
            None,
        )
        .map_err(|e| self.invalid(e.to_string()))?;
        Ok(Kernel {
            protocol: Protocol::Linux64 {
                entry: layout::KERNEL + ENTRY_64,
                header: loaded.setup_header.unwrap_or(header),
            },
            end,
            initrd_last: match header.initrd_addr_max {
                0 => INITRD_LAST,
                last => u64::from(last),
            },
        })
    }

    fn load_elf(mut self, mem: &GuestMemory) -> Result<Kernel> {
        let header = self.elf_header()?;
        let end = self.check_segments(mem, &header)?;
        let loaded =
            Elf::load(mem, None, &mut self.file, None).map_err(|e| self.invalid(e.to_string()))?;
        let protocol = match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(entry) => Protocol::Pvh { entry: entry.0 },
            _ => Protocol::Linux64 {
                entry: header.e_entry,
                header: setup_header {
                    boot_flag: BOOT_FLAG,
                    header: HEADER_MAGIC,
                    version: VERSION_WITH_XLOADFLAGS,
                    ..Default::default()
                },
            },
        };
        let (Protocol::Pvh { entry } | Protocol::Linux64 { entry, .. }) = protocol;
        if !(layout::KERNEL..end).contains(&entry) {
            return Err(self.invalid(format!("entry point {entry:#x} lies outside the kernel")));
        }
        Ok(Kernel {
            protocol,
            end,
            initrd_last: INITRD_LAST,
        })
    }

    fn elf_header(&mut self) -> Result<Elf64_Ehdr> {
        let mut header = Elf64_Ehdr::default();
        self.file
            .read_exact_at(header.as_mut_slice(), 0)
            .map_err(|e| self.read_error(e))?;
        if header.e_ident[4] != ELF_CLASS_64 || header.e_machine != ELF_MACHINE_X86_64 {
            return Err(self.invalid("is not an ELF file for 64-bit x86"));
        }
        if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
            return Err(self.invalid(format!("e_phentsize is {}", header.e_phentsize)));
        }
        Ok(header)
    }

    /// Checks that each loadable segment comes to lie between 1 MiB and the end of low RAM, and
    /// returns where the last one ends. What is below 1 MiB is ours.
    fn check_segments(&mut self, mem: &GuestMemory, header: &Elf64_Ehdr) -> Result<u64> {
        self.file
            .seek(SeekFrom::Start(header.e_phoff))
            .map_err(|e| self.read_error(e))?;
        let mut kernel_end = 0;
        for index in 0..header.e_phnum {
            let mut segment = Elf64_Phdr::default();
            self.file
                .read_exact(segment.as_mut_slice())
                .map_err(|e| self.read_error(e))?;
            if segment.p_type != PT_LOAD || segment.p_memsz == 0 {
                continue;
            }
            let (start, size) = (segment.p_paddr, segment.p_memsz);
            if start < layout::KERNEL {
                return Err(self.invalid(format!(
                    "segment {index} begins at {start:#x}; below 1 MiB is no room for a kernel"
                )));
            }
            if segment.p_filesz > size
                || segment
                    .p_offset
                    .checked_add(segment.p_filesz)
                    .is_none_or(|end| end > self.size)
            {
                return Err(self.invalid(format!("segment {index} is cut off")));
            }
            let end = start.saturating_add(size);
            check_memory(mem, end)?;
            kernel_end = kernel_end.max(end);
        }
        if kernel_end == 0 {
            return Err(self.invalid("has nothing to load"));
        }
        Ok(kernel_end)
    }
}

fn check_memory(mem: &GuestMemory, need: u64) -> Result<()> {
    let have = memory::low_end(mem);
    if need > have {
        return Err(KernelError::Memory {
            have,
            need,
            initrd: false,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use linux_loader::elf::PT_NOTE;
    use vm_memory::GuestMemoryBackend;

    const MIB: u64 = 1 << 20;

    /// An ELF file with one loadable segment of 16 bytes at 2 MiB, to be changed by `change`.
    fn elf(change: impl FnOnce(&mut Elf64_Ehdr, &mut Elf64_Phdr)) -> Vec<u8> {
        let mut header = Elf64_Ehdr {
            e_machine: ELF_MACHINE_X86_64,
            e_entry: 2 * MIB,
            e_phoff: 64,
            e_phentsize: 56,
            e_phnum: 1,
            ..Default::default()
        };
        header.e_ident[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let mut segment = Elf64_Phdr {
            p_type: PT_LOAD,
            p_offset: 120,
            p_paddr: 2 * MIB,
            p_filesz: 16,
            p_memsz: 4096,
            ..Default::default()
        };
        change(&mut header, &mut segment);
        let mut file = header.as_slice().to_vec();
        file.extend(segment.as_slice());
        file.extend([0x90; 16]);
        file
    }

    /// A bzImage of `payload` bytes that says to need `init_size` bytes at 2 MiB.
    fn bzimage(init_size: u32, payload: usize) -> Vec<u8> {
        let header = setup_header {
            setup_sects: 1,
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            version: 0x20f,
            loadflags: 1,
            xloadflags: XLF_KERNEL_64,
            initrd_addr_max: 0x7fff_ffff,
            pref_address: 2 * MIB,
            init_size,
            ..Default::default()
        };
        let mut file = vec![0; HEADER_OFFSET as usize];
        file.extend(header.as_slice());
        file.resize(1024, 0);
        file.resize(1024 + payload, 0xcc);
        file
    }

    fn load(file: &[u8], memory: u64) -> (GuestMemory, Result<Kernel>) {
        let mem = memory::create(memory).unwrap();
        let mut path = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut path, file).unwrap();
        let kernel = Kernel::load(&mem, path.path());
        (mem, kernel)
    }

    fn refused(file: &[u8], memory: u64) -> String {
        load(file, memory).1.unwrap_err().to_string()
    }

    #[test]
    fn elf_is_loaded_where_it_says() {
        let (mem, kernel) = load(&elf(|_, _| {}), 4 * MIB);
        let kernel = kernel.unwrap();
        assert_eq!(kernel.end, 2 * MIB + 4096);
        assert!(matches!(
            kernel.protocol,
            Protocol::Linux64 { entry, .. } if entry == 2 * MIB
        ));
        let loaded: [u8; 17] = mem.read_obj(GuestAddress(2 * MIB)).unwrap();
        assert_eq!((&loaded[..16], loaded[16]), (&[0x90; 16][..], 0));
    }

    #[test]
    fn bzimage_is_loaded_at_1_mib() {
        let (mem, kernel) = load(&bzimage(2 << 20, 5000), 8 * MIB);
        let kernel = kernel.unwrap();
        assert_eq!((kernel.end, kernel.initrd_last), (4 * MIB, 0x7fff_ffff));
        assert!(matches!(
            kernel.protocol,
            Protocol::Linux64 { entry, .. } if entry == MIB + 0x200
        ));
        let first: u8 = mem.read_obj(GuestAddress(MIB)).unwrap();
        assert_eq!(first, 0xcc);
    }

    #[test]
    fn bad_files_are_refused() {
        for file in [&b""[..], b"\x7fEL", &[0; 4096], b"\x1f\x8b\x08"] {
            assert!(refused(file, 4 * MIB).contains("neither"), "{file:?}");
        }
        let elves = [
            (
                elf(|h, _| h.e_ident[4] = 1),
                "not an ELF file for 64-bit x86",
            ),
            (
                elf(|h, _| h.e_machine = 183),
                "not an ELF file for 64-bit x86",
            ),
            (elf(|h, _| h.e_phentsize = 32), "e_phentsize is 32"),
            (elf(|h, _| h.e_phnum = 0), "nothing to load"),
            (elf(|h, _| h.e_phnum = 9), "could not read"),
            (elf(|h, _| h.e_phoff = u64::MAX), "could not read"),
            (elf(|h, _| h.e_entry = 0x1000), "entry point 0x1000"),
            (elf(|_, s| s.p_paddr = 0x7000), "segment 0 begins at 0x7000"),
            (elf(|_, s| s.p_filesz = 17), "segment 0 is cut off"),
            (elf(|_, s| s.p_offset = u64::MAX), "segment 0 is cut off"),
            (elf(|_, s| s.p_memsz = 8), "segment 0 is cut off"),
            (elf(|_, s| s.p_memsz = u64::MAX), "give it more"),
            (elf(|_, s| s.p_type = PT_NOTE), "nothing to load"),
        ];
        for (file, text) in elves {
            let message = refused(&file, 4 * MIB);
            assert!(message.contains(text), "{message}");
        }
        let mut no_64_bit = bzimage(MIB as u32, 100);
        no_64_bit[0x236] = 0;
        assert!(refused(&no_64_bit, 8 * MIB).contains("no 64-bit entry point"));
        let mut cut_off = bzimage(MIB as u32, 0);
        cut_off.truncate(1000);
        assert!(refused(&cut_off, 8 * MIB).contains("bzImage"));
    }

    #[test]
    fn too_little_memory_is_named() {
        let message = refused(&bzimage(66 << 20, 100), 64 * MIB);
        assert_eq!(
            message,
            "the guest has 64 MiB of memory, its kernel needs at least 68 MiB: give it more with \
             --memory"
        );
    }

    /// Whether the mapping that begins at `place` asks for large pages.
    fn may_be_large(place: *const u8) -> bool {
        let mappings = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let begin = format!("{:x}-", place as usize);
        let mut lines = mappings
            .lines()
            .skip_while(|line| !line.starts_with(&begin));
        let flags = lines.find(|line| line.starts_with("VmFlags:"));
        flags.is_some_and(|flags| flags.split(' ').any(|flag| flag == "hg"))
    }

    #[test]
    fn initrd_lies_at_the_top_and_above_the_kernel() {
        let (mem, kernel) = load(&bzimage(2 << 20, 100), 8 * MIB);
        let mut kernel = kernel.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("initrd");
        std::fs::write(&path, vec![7; 5000]).unwrap();
        let placed = load_initrd(&mem, &kernel, &path).unwrap();
        assert_eq!(placed, (8 * MIB - 8192, 5000));
        let end: [u8; 2] = mem.read_obj(GuestAddress(8 * MIB - 8192 + 4999)).unwrap();
        assert_eq!(end, [7, 0]);

        kernel.initrd_last = 5 * MIB - 1;
        let placed = load_initrd(&mem, &kernel, &path).unwrap();
        assert_eq!(placed, (5 * MIB - 8192, 5000));

        if Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            let place = GuestMemoryBackend::get_host_address(&mem, GuestAddress(placed.0));
            assert!(
                may_be_large(place.unwrap()),
                "the host gives it large pages"
            );
        }

        std::fs::write(&path, vec![7; 4 << 20]).unwrap();
        let message = load_initrd(&mem, &kernel, &path).unwrap_err().to_string();
        assert!(
            message.contains("kernel and initrd need at least 8 MiB"),
            "{message}"
        );
    }
}
