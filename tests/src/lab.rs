//! The kernel, its modules and busybox, as `tests/setup` unpacks them in `target/lab`.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::process::{self, stdout};

/// A directory like the one that `tests/setup` fills.
pub struct Lab {
    dir: PathBuf,
}

/// The kinds of kernel image that `tandem run` boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// The compressed image that distributions install.
    BzImage,
    /// The ELF file inside of it, with a PVH entry point.
    Vmlinux,
}

/// One kernel module, ready for `insmod`.
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The contents of its `.ko` file.
    pub image: Vec<u8>,
}

impl Lab {
    /// Opens `dir`.
    pub fn open(dir: &Path) -> Result<Lab> {
        let lab = Lab { dir: dir.into() };
        for needed in [lab.kernel(Kernel::BzImage), lab.busybox()] {
            if !needed.exists() {
                return Err(Error::new(format!(
                    "{needed:?} is missing: run tests/setup"
                )));
            }
        }
        Ok(lab)
    }

    /// Where all of it is.
    pub fn directory(&self) -> &Path {
        &self.dir
    }

    /// The stock kernel.
    pub fn kernel(&self, kind: Kernel) -> PathBuf {
        self.dir.join("kernel").join(match kind {
            Kernel::BzImage => "vmlinuz",
            Kernel::Vmlinux => "vmlinux",
        })
    }

    /// The statically linked busybox.
    pub fn busybox(&self) -> PathBuf {
        self.dir.join("busybox/bin/busybox")
    }

    /// The named modules and those they depend on, in an order that `insmod` accepts. Those built
    /// into the kernel are left out.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<Module>> {
        let files = self.module_files()?;
        let builtin = self.builtin_modules()?;
        let mut loaded: Vec<Module> = Vec::new();
        let mut wanted: Vec<String> = names.iter().rev().map(|name| name.to_string()).collect();
        // Depth first: a module stays on the stack until all it depends on is loaded.
        while let Some(name) = wanted.last().cloned() {
            if builtin.contains(&name) || loaded.iter().any(|module| module.name == name) {
                wanted.pop();
                continue;
            }
            let file = files
                .get(&name)
                .ok_or_else(|| Error::new(format!("the kernel has no module {name}")))?;
            let image = read_module(file)?;
            let missing: Vec<String> = dependencies(&image)
                .into_iter()
                .filter(|dep| !builtin.contains(dep) && !loaded.iter().any(|m| &m.name == dep))
                .collect();
            if missing.is_empty() {
                loaded.push(Module { name, image });
            } else if wanted.len() < 64 {
                wanted.extend(missing);
            } else {
                return Err(Error::new(format!("module {name} depends on itself")));
            }
        }
        Ok(loaded)
    }

    fn modules_dir(&self) -> Result<PathBuf> {
        let parent = self.dir.join("kernel/lib/modules");
        let version = fs::read_dir(&parent)
            .context(format!("listing {parent:?}"))?
            .next()
            .ok_or_else(|| Error::new(format!("{parent:?} is empty: run tests/setup")))?
            .context(format!("listing {parent:?}"))?;
        Ok(version.path())
    }

    fn module_files(&self) -> Result<HashMap<String, PathBuf>> {
        let mut files = HashMap::new();
        let mut directories = vec![self.modules_dir()?.join("kernel")];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory).context(format!("listing {directory:?}"))? {
                let path = entry.context(format!("listing {directory:?}"))?.path();
                if path.is_dir() {
                    directories.push(path);
                } else if let Some(name) = module_name(&path) {
                    files.insert(name, path);
                }
            }
        }
        Ok(files)
    }

    fn builtin_modules(&self) -> Result<Vec<String>> {
        let list = self.modules_dir()?.join("modules.builtin");
        let text = fs::read_to_string(&list).context(format!("reading {list:?}"))?;
        Ok(text
            .lines()
            .filter_map(|line| module_name(Path::new(line)))
            .collect())
    }
}

/// `drivers/block/virtio-blk.ko.xz` → `virtio_blk`.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name().and_then(OsStr::to_str)?;
    let (name, extension) = file.split_once('.')?;
    extension.starts_with("ko").then(|| name.replace('-', "_"))
}

fn read_module(path: &Path) -> Result<Vec<u8>> {
    if path.extension() == Some(OsStr::new("xz")) {
        return stdout(process::command("xz").arg("-dc").arg(path));
    }
    fs::read(path).context(format!("reading {path:?}"))
}

/// The `depends=` entry of a module's `.modinfo` section.
fn dependencies(image: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = image.windows(key.len()).position(|window| window == key) else {
        return Vec::new();
    };
    let value = image[at + key.len()..]
        .split(|&byte| byte == 0)
        .next()
        .unwrap_or_default();
    String::from_utf8_lossy(value)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_modules() {
        let name = |path| module_name(Path::new(path));
        assert_eq!(
            name("kernel/arch/x86/kvm/kvm-amd.ko").as_deref(),
            Some("kvm_amd")
        );
        assert_eq!(name("a/virtio_blk.ko.xz").as_deref(), Some("virtio_blk"));
        assert_eq!(name("modules.order"), None);
    }

    #[test]
    fn dependencies_of_a_module() {
        assert_eq!(
            dependencies(b"x\0depends=kvm,irq-bypass\0y"),
            ["kvm", "irq_bypass"]
        );
        assert!(dependencies(b"x\0depends=\0y").is_empty());
        assert!(dependencies(b"").is_empty());
    }
}
