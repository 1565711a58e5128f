//! Who has a file open, for `info`.

use std::fs::Metadata;

use serde_json::{Value, json};
use tandem_block::{FileUser, FileUsers};

/// The processes that have a file open, but for this one.
pub struct Users(FileUsers);

impl Users {
    /// Those who have the file open that `metadata` is of.
    pub fn of(metadata: &Metadata) -> Self {
        let mut users = FileUsers::of(metadata);
        users.found.retain(|user| user.pid != std::process::id());
        Self(users)
    }

    /// Lines for people.
    pub fn human(&self) -> String {
        let mut text = "users:\n".to_owned();
        for user in &self.0.found {
            text += &format!("    {user}: {}\n", access(user));
        }
        match (self.0.unseen, self.0.found.len()) {
            (0, 0) => text += "    none\n",
            (0, _) => {}
            (unseen, _) => {
                text += &format!(
                    "    {unseen} other processes cannot be looked into (as root they can)\n"
                );
            }
        }
        text
    }

    /// The same for programs.
    pub fn json(&self) -> Value {
        let found = self.0.found.iter().map(
            |user| json!({ "pid": user.pid, "command": user.command, "access": access(user) }),
        );
        json!({ "processes": found.collect::<Vec<_>>(), "unseen": self.0.unseen })
    }
}

fn access(user: &FileUser) -> &'static str {
    if user.writes { "write" } else { "read" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_seen_is_told() {
        let user = |(pid, writes)| FileUser {
            pid,
            command: "a\nb".into(),
            writes,
            has_lock: false,
        };
        let users = |found: &[bool], unseen| {
            let found = (7..).zip(found.iter().copied()).map(user).collect();
            Users(FileUsers { found, unseen })
        };
        assert_eq!(users(&[], 0).human(), "users:\n    none\n");
        let text = users(&[true, false], 3).human();
        assert_eq!(
            text,
            "users:\n    process 7 (a\\nb): write\n    process 8 (a\\nb): read\n    \
             3 other processes cannot be looked into (as root they can)\n"
        );
        let json = users(&[false], 3).json();
        let expected = json!({
            "processes": [{ "pid": 7, "command": "a\nb", "access": "read" }],
            "unseen": 3,
        });
        assert_eq!(json, expected);
    }
}
