//! Checks whether a process belongs to a container, and whether it is in this process's network namespace. A process id
//! that an engine reports is valid on the engine's machine alone, and may be that of an unrelated process here.
//!
//! The kernel's files about a process (`cgroups(7)`, `proc_pid_mountinfo(5)`) contain the id of its container: an
//! engine makes a control group for each container, or at least mounts files of the container's own. The helper is
//! asked to enter a process only on the evidence of its control group: the helper has the privilege to enter any
//! process, and cannot read `/proc` of the host to check one itself.

use std::io;
use std::path::PathBuf;

use crate::sys::paths::identity_of_file;

/// The evidence that a process is one of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Evidence {
    /// The control group. A process needs privilege to join that of another container.
    ControlGroup,
    /// The mounted files. In a user namespace of its own, any process may mount files with such names.
    Mounts,
}

/// Returns the evidence that this process belongs to the container with this id; `None` if this machine
/// has none.
///
/// # Errors
/// The files of the process cannot be read; those of a process that has ended are not found.
pub(super) fn evidence(pid: u32, container: &str) -> io::Result<Option<Evidence>> {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}"));
    if names(&read("cgroup")?, container) {
        return Ok(Some(Evidence::ControlGroup));
    }
    Ok(names(&read("mountinfo")?, container).then_some(Evidence::Mounts))
}

/// Whether a text contains the container's full id; a prefix is not enough.
fn names(text: &str, id: &str) -> bool {
    const ID_CHARS_MIN: usize = 32;
    id.len() >= ID_CHARS_MIN && text.contains(id)
}

/// Whether a process is in the network namespace of this one; `None` if this user may not read that.
pub(super) fn is_in_our_network(pid: u32) -> Option<bool> {
    let namespace = |process: &str| identity_of_file(&PathBuf::from(format!("/proc/{process}/ns/net")));
    Some(namespace(&pid.to_string())? == namespace("self")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "6d1e3a9b6d1e3a9b6d1e3a9b6d1e3a9b6d1e3a9b6d1e3a9b6d1e3a9b6d1e3a9b";

    #[test]
    fn container_is_named_by_its_full_id() {
        for text in [
            format!("0::/system.slice/docker-{ID}.scope\n"),
            format!("12:pids:/docker/{ID}\n1:name=systemd:/docker/{ID}\n"),
            format!(
                "0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container\n"
            ),
            format!(
                "540 510 254:1 /var/lib/docker/containers/{ID}/hostname /etc/hostname rw - ext4 /dev/vda rw\n"
            ),
        ] {
            assert!(names(&text, ID), "{text}");
        }
        let other = ID.replace('6', "7");
        assert!(!names(&format!("0::/docker/{other}\n"), ID));
        assert!(!names("0::/docker/6d1e\n", "6d1e"));
        assert!(!names("0::/\n", ""));
    }

    #[test]
    fn unrelated_process_has_no_evidence() {
        let own = std::process::id();
        assert_eq!(evidence(own, ID).unwrap(), None);
        assert_eq!(evidence(u32::MAX, ID).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(is_in_our_network(own), Some(true));
        assert_eq!(is_in_our_network(u32::MAX), None);
    }
}
