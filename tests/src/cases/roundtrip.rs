//! What a guest writes, a second guest and QEMU read, whoever made the image and wherever the
//! data is.

use crate::disk::{Image, Kind, Maker};
use crate::error::Result;
use crate::guest::Guest;
use crate::lab::Kernel;
use crate::suite::{Bench, Case};

/// Makes a file system, fills it with files that differ, several at a time, and removes some.
pub const FILL: &str = r#"
/bin/mke2fs -q -t ext4 -b 4096 /dev/vda
mount -t ext4 /dev/vda /mnt
mkdir /mnt/d
for i in 1 2 3 4 5 6; do
    { echo $i; cat /seed; } >/mnt/d/$i &
    writers="$writers $!"
done
for writer in $writers; do wait $writer; done
rm /mnt/d/3 /mnt/d/4
dd if=/seed of=/mnt/d/3 bs=5000 count=77 conv=fsync 2>/dev/null
umount /mnt
echo "@ sha256 $(sha256sum </dev/vda | cut -d' ' -f1)"
"#;

/// Verifies the files of [`FILL`], and changes some in place.
pub const VERIFY: &str = r#"
mount -t ext4 /dev/vda /mnt
cd /mnt/d
for i in 1 2 5 6; do
    { echo $i; cat /seed; } | cmp - $i
done
dd if=/seed bs=5000 count=77 2>/dev/null | cmp - 3
[ ! -e 4 ]
dd if=/seed of=5 bs=4096 seek=17 count=100 conv=notrunc 2>/dev/null
rm 6
cat 1 2 >7
cd /
umount /mnt
echo "@ sha256 $(sha256sum </dev/vda | cut -d' ' -f1)"
"#;

struct Round {
    kind: Kind,
    maker: Maker,
    options: &'static str,
    kernel: Kernel,
    cpus: usize,
}

impl Round {
    fn name(&self) -> String {
        let kind = match self.kind {
            Kind::Internal => "internal",
            Kind::External => "external",
            Kind::ExternalRaw => "external_raw",
            Kind::Packed => "packed",
        };
        let maker = match self.maker {
            Maker::QemuImg => "qemu_img",
            Maker::TandemImg => "tandem_img",
        };
        let options = match self.options.split_once('=') {
            Some((_, value)) => format!("_{}", value.trim_end_matches(',')),
            None => String::new(),
        };
        format!("roundtrip::{kind}_by_{maker}{options}_{}cpu", self.cpus)
    }

    fn run(&self, bench: &Bench) -> Result<()> {
        let image = Image::create(
            bench,
            "disk.qcow2",
            self.kind,
            self.maker,
            self.options,
            "32M",
        )?;
        for script in [FILL, VERIFY] {
            let boot = Guest::new(bench)
                .kernel(self.kernel)
                .cpus(self.cpus)
                .disk(&image.path, "")
                .boot(script)?
                .succeeded();
            image.check()?;
            image.assert_sha256(self.kind, boot.value("sha256"))?;
        }
        Ok(())
    }
}

pub fn cases() -> Vec<Case> {
    use Kernel::{BzImage, Vmlinux};
    use Kind::{External, ExternalRaw, Internal, Packed};
    use Maker::{QemuImg, TandemImg};
    let rounds = [
        (Internal, QemuImg, "", BzImage, 4),
        (External, QemuImg, "", Vmlinux, 4),
        (ExternalRaw, QemuImg, "", BzImage, 1),
        (Internal, TandemImg, "", Vmlinux, 1),
        (External, TandemImg, "", BzImage, 1),
        (ExternalRaw, TandemImg, "", Vmlinux, 4),
        (Internal, QemuImg, "cluster_size=512,", BzImage, 1),
        (External, TandemImg, "cluster_size=4k,", BzImage, 4),
        (ExternalRaw, QemuImg, "cluster_size=2M,", Vmlinux, 1),
        (Packed, TandemImg, "", BzImage, 4),
    ];
    rounds
        .into_iter()
        .map(|(kind, maker, options, kernel, cpus)| Round {
            kind,
            maker,
            options,
            kernel,
            cpus,
        })
        .map(|round| Case::new(round.name(), move |bench| round.run(bench)))
        .collect()
}
