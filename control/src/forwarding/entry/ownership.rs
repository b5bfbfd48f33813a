//! Whether a process is a container's, and whether it is in the host's network: an engine's word on a process id holds on the
//! engine's machine alone, and may name a stranger here.
//!
//! What the kernel tells of a process (`cgroups(7)`, `proc_pid_mountinfo(5)`) names its container by id: an engine makes a
//! control group for each, or at least mounts files of the container's own. The helper is only asked to enter a process with the
//! former: it has the privilege to enter any process, and cannot read `/proc` of the host to check one itself.

use std::io;
use std::path::PathBuf;

use crate::sys::paths::identity_of_file;

/// The evidence that a process is one of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Evidence {
    /// Its control group. A process needs privilege to join one of another container.
    ControlGroup,
    /// The files that are mounted for it. In a user namespace of its own, any process may mount files with such names.
    Mounts,
}

/// Returns the evidence that the process of this number is one of the container with this id, if there is any on this machine.
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

/// Whether a text names a container by its id. The beginning of one is none.
fn names(text: &str, id: &str) -> bool {
    const ID_CHARS_MIN: usize = 32;
    id.len() >= ID_CHARS_MIN && text.contains(id)
}

/// Whether a process shares the network of this one; none where this user may not know.
pub(super) fn is_in_our_network(pid: u32) -> Option<bool> {
    let namespace = |process: &str| identity_of_file(&PathBuf::from(format!("/proc/{process}/ns/net")));
    Some(namespace(&pid.to_string())? == namespace("self")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "6d1e3a9b6d1e3a9b6d1e3a9b6d1e3a9b6d1e3a9b6d1e3a9b6d1e3a9b6d1e3a9b";

    #[test]
    fn a_container_is_named_by_its_whole_id() {
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
    fn a_process_of_this_machine_is_of_no_container_that_it_is_not_in() {
        let own = std::process::id();
        assert_eq!(evidence(own, ID).unwrap(), None);
        assert_eq!(evidence(u32::MAX, ID).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(is_in_our_network(own), Some(true));
        assert_eq!(is_in_our_network(u32::MAX), None);
    }
}
