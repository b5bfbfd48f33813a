//! Parsers for the files of `/proc/PID` that the supervisor reads. Pure.
//!
//! The kernel writes these files, but a process in the sandbox influences their contents, such as its own name in
//! `status`. A line that does not parse is skipped, so the result may lack a fact, and a missing fact means that a socket is
//! relayed.

/// `O_CLOEXEC` and `O_ASYNC` as `fdinfo` prints them: octal, in the numbers of the architecture.
const CLOEXEC: u32 = libc::O_CLOEXEC as u32;
const ASYNC: u32 = libc::O_ASYNC as u32;

/// The flags of one descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flags {
    /// Closed by `execve(2)`. The flag belongs to the descriptor and not to its file.
    pub(super) close_on_exec: bool,
    /// The file signals readiness (`O_ASYNC`) to a process that is known only to the file.
    pub(super) is_async: bool,
}

/// Reads the flags of a descriptor from its `fdinfo`.
pub(super) fn flags(fdinfo: &str) -> Option<Flags> {
    let value = fdinfo.lines().find_map(|line| line.strip_prefix("flags:"))?;
    let value = u32::from_str_radix(value.trim(), 8).ok()?;
    Some(Flags { close_on_exec: value & CLOEXEC != 0, is_async: value & ASYNC != 0 })
}

/// Whether an epoll instance with this `fdinfo` watches the file with this inode of the socket file system.
///
/// Inodes of other file systems may have the same number; a socket then counts as watched although it is not.
pub(super) fn epoll_watches(fdinfo: &str, inode: u64) -> bool {
    let targets = fdinfo.lines().filter(|line| line.starts_with("tfd:"));
    let inodes = targets.filter_map(|line| line.split_once("ino:")?.1.split_whitespace().next());
    inodes.filter_map(|number| u64::from_str_radix(number, 16).ok()).any(|watched| watched == inode)
}

/// Parses the inode from the link of a socket descriptor (`socket:[INODE]`).
pub(super) fn socket_inode(link: &[u8]) -> Option<u64> {
    let number = link.strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
    std::str::from_utf8(number).ok()?.parse().ok()
}

/// Whether the link of a descriptor is that of an epoll instance.
pub(super) fn is_epoll(link: &[u8]) -> bool {
    link == b"anon_inode:[eventpoll]"
}

/// Fields of the `status` of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status {
    /// The process of the thread.
    pub(super) process: u32,
    /// The parent of that process; 0 if it is outside of our pid namespace.
    pub(super) parent: u32,
    /// The number of threads of the process.
    pub(super) threads: u32,
}

/// Parses a `status` file. The name comes first, and the kernel escapes newlines in it.
pub(super) fn status(text: &str) -> Option<Status> {
    let number = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        value.trim().parse().ok()
    };
    Some(Status { process: number("Tgid")?, parent: number("PPid")?, threads: number("Threads")? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn flags_are_octal() {
        let text = "pos:\t0\nflags:\t02004002\nmnt_id:\t10\nino:\t4242\n";
        assert_eq!(flags(text), Some(Flags { close_on_exec: true, is_async: false }));
        assert_eq!(flags("flags:\t020002\n"), Some(Flags { close_on_exec: false, is_async: true }));
        assert_eq!(flags("pos:\t0\n"), None);
        assert_eq!(flags("flags:\t9\n"), None);
    }

    #[test]
    fn an_epoll_instance_names_its_targets_by_inode() {
        let text = "pos:\t0\nflags:\t02000002\n\
            tfd:        8 events:       19 data:                8  pos:0 ino:1f2a sdev:8\n\
            tfd:        9 events:        1 data:                9  pos:0 ino:3e8 sdev:d\n";
        assert!(epoll_watches(text, 0x1f2a));
        assert!(epoll_watches(text, 1000));
        assert!(!epoll_watches(text, 0x1f2));
        assert!(!epoll_watches("flags:\t02\n", 2));
    }

    #[test]
    fn a_socket_is_known_by_its_link() {
        assert_eq!(socket_inode(b"socket:[4242]"), Some(4242));
        assert_eq!(socket_inode(b"socket:[]"), None);
        assert_eq!(socket_inode(b"/tmp/socket:[4242]"), None);
        assert!(is_epoll(b"anon_inode:[eventpoll]"));
        assert!(!is_epoll(b"/tmp/anon_inode:[eventpoll]"));
    }

    #[test]
    fn a_process_name_is_not_parsed_as_a_field() {
        let text =
            "Name:\tThreads:\\t9\nUmask:\t0022\nState:\tS\nTgid:\t42\nPid:\t43\nPPid:\t7\nThreads:\t2\n";
        assert_eq!(status(text), Some(Status { process: 42, parent: 7, threads: 2 }));
        assert_eq!(status("Tgid:\t42\n"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in "[a-z:\\[\\]0-9 \t\n]{0,128}", inode: u64) {
            let _ = flags(&text);
            let _ = epoll_watches(&text, inode);
            let _ = socket_inode(text.as_bytes());
            let _ = status(&text);
        }
    }
}
