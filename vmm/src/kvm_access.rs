//! Why `/dev/kvm` may not be opened, and what can be done about that.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::{getegid, geteuid, getgroups};

/// Who is kept from the device, and what the system knows of groups.
struct Access<'a> {
    /// Permissions of the device, and the group that they are for.
    mode: u32,
    gid: u32,
    /// The groups of this process.
    groups: &'a [u32],
    uid: u32,
    /// `/etc/group` and `/etc/passwd`.
    group_file: &'a str,
    user_file: &'a str,
}

/// What to do about `/dev/kvm`, which this process may not open.
pub(crate) fn advice() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let Ok(device) = Path::new("/dev/kvm").metadata() else {
        return "the system does not tell why".to_owned();
    };
    let mut groups: Vec<_> = getgroups().unwrap_or_default();
    groups.push(getegid());
    let groups: Vec<_> = groups.into_iter().map(|group| group.as_raw()).collect();
    let access = Access {
        mode: device.mode(),
        gid: device.gid(),
        groups: &groups,
        uid: geteuid().as_raw(),
        group_file: &read("/etc/group"),
        user_file: &read("/etc/passwd"),
    };
    access.advice()
}

impl Access<'_> {
    fn advice(&self) -> String {
        let found = lines(self.group_file).find(|fields| number(fields, 2) == Some(self.gid));
        let name = found.as_ref().and_then(|fields| fields.first()).copied();
        let Some(group) = name.filter(|_| self.mode & 0o060 == 0o060 && self.gid != 0) else {
            return "it is for root alone; as root, 'chgrp kvm /dev/kvm && chmod 660 /dev/kvm' \
                    opens it to members of the group kvm"
                .to_owned();
        };
        if self.groups.contains(&self.gid) {
            return format!(
                "its group {group} is one of yours, so something else forbids it: \
                 a container needs the device, as with --device /dev/kvm"
            );
        }
        let user = lines(self.user_file).find(|fields| number(fields, 2) == Some(self.uid));
        let user = user.as_ref().and_then(|fields| fields.first()).copied();
        let members = found.and_then(|fields| fields.get(3).copied());
        let members = members.unwrap_or_default();
        match user.filter(|user| members.split(',').any(|member| member == *user)) {
            Some(_) => format!(
                "you have become a member of the group {group} since you logged in: \
                 log in again, or try 'newgrp {group}'"
            ),
            None => format!(
                "it is for root and for members of the group {group}: \
                 add yourself with 'sudo usermod -aG {group} $USER' and log in again"
            ),
        }
    }
}

/// The fields of each line.
fn lines(file: &str) -> impl Iterator<Item = Vec<&str>> {
    file.lines().map(|line| line.split(':').collect())
}

fn number(fields: &[&str], index: usize) -> Option<u32> {
    fields.get(index)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_fits_the_case() {
        let access = |mode, gid, groups, uid| Access {
            mode,
            gid,
            groups,
            uid,
            group_file: "root:x:0:\nbad\nvirt:x:7:anna,otto\n",
            user_file: "root:x:0:0::/:\nanna:x:1000:1000::/:\nann:x:1001:1001::/:\n",
        };
        let has = |access: Access<'_>, text: &str| {
            let advice = access.advice();
            assert!(advice.contains(text), "{advice}");
        };
        has(
            access(0o20_660, 7, &[1001], 1001),
            "'sudo usermod -aG virt $USER'",
        );
        has(access(0o20_660, 7, &[5], 1234), "members of the group virt");
        has(access(0o20_660, 7, &[1000], 1000), "'newgrp virt'");
        has(
            access(0o20_660, 7, &[1000, 7], 1000),
            "something else forbids it",
        );
        for (mode, gid) in [(0o20_600, 7), (0o20_640, 7), (0o20_660, 0), (0o20_660, 8)] {
            has(access(mode, gid, &[1000], 1000), "chmod 660 /dev/kvm");
        }
    }
}
