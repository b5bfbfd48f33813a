use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use super::*;

fn open_descriptors_of_file(inode: u64) -> usize {
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::metadata(entry.unwrap().path()).ok())
        .filter(|file| std::os::unix::fs::MetadataExt::ino(file) == inode)
        .count()
}

/// A new file, and its inode, by which a test counts its descriptors.
fn marker() -> (OwnedFd, u64) {
    let file = tempfile::tempfile().unwrap();
    let inode = std::os::unix::fs::MetadataExt::ino(&file.metadata().unwrap());
    (file.into(), inode)
}

#[test]
fn a_message_arrives_whole_with_its_descriptors() {
    let (one, other) = Channel::pair().unwrap();
    let (file, inode) = marker();
    one.send(&"ahoy", &[file.as_fd(); 3]).unwrap();
    let (text, descriptors) = other.recv::<String>().unwrap().unwrap();
    assert_eq!(text, "ahoy");
    assert_eq!(descriptors.len(), 3);
    assert_eq!(open_descriptors_of_file(inode), 4);
    for descriptor in &descriptors {
        let flags = rustix::io::fcntl_getfd(descriptor).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }
}

#[test]
fn as_many_descriptors_as_the_kernel_takes_arrive() {
    let (one, other) = Channel::pair().unwrap();
    let (file, _) = marker();
    one.send(&1, &[file.as_fd(); DESCRIPTORS_PER_MESSAGE_MAX]).unwrap();
    assert_eq!(other.recv::<u8>().unwrap().unwrap().1.len(), DESCRIPTORS_PER_MESSAGE_MAX);
    let many = one.send(&1, &[file.as_fd(); DESCRIPTORS_PER_MESSAGE_MAX + 1]).unwrap_err();
    assert!(matches!(many, ChannelError::TooManyDescriptors { count: 254 }));
}

#[test]
fn a_message_of_the_maximum_length_passes_and_a_longer_one_fails() {
    let (one, other) = Channel::pair().unwrap();
    let longest = "x".repeat(MESSAGE_BYTES_MAX - 2);
    one.send(&longest, &[]).unwrap();
    assert_eq!(other.recv::<String>().unwrap().unwrap().0, longest);
    let error = one.send(&(longest + "x"), &[]).unwrap_err();
    assert!(matches!(error, ChannelError::TooLong { bytes } if bytes == MESSAGE_BYTES_MAX + 1));
}

#[test]
fn a_truncated_message_is_refused_and_its_descriptors_are_closed() {
    let (one, other) = Channel::pair().unwrap();
    let (file, inode) = marker();
    one.send(&"x".repeat(200), &[file.as_fd(); 5]).unwrap();
    let error = receive::<String>(other.as_fd(), 100, RecvFlags::DONTWAIT).unwrap_err();
    assert!(matches!(error, ChannelError::Cut { bytes_max: 100 }));
    assert_eq!(open_descriptors_of_file(inode), 1);
}

#[test]
fn an_invalid_message_is_refused_and_its_descriptors_are_closed() {
    let (one, other) = Channel::pair().unwrap();
    let (file, inode) = marker();
    send_bytes(one.as_fd(), b"{]", &[file.as_fd(); 5], SendFlags::empty()).unwrap();
    assert!(matches!(other.recv::<String>(), Err(ChannelError::Malformed(_))));
    assert_eq!(open_descriptors_of_file(inode), 1);
    one.send(&"and it still works", &[]).unwrap();
    assert!(other.recv::<String>().unwrap().is_some());
}

#[test]
fn messages_before_the_end_are_received_first() {
    let (one, other) = Channel::pair().unwrap();
    // Because of the unread message, the kernel reports a reset ahead of the queued messages.
    other.send(&"never read", &[]).unwrap();
    one.send(&"last words", &[]).unwrap();
    drop(one);
    assert_eq!(other.recv::<String>().unwrap().unwrap().0, "last words");
    assert!(other.recv::<String>().unwrap().is_none());
    assert!(matches!(other.send(&1, &[]), Err(ChannelError::Gone)));
}

#[test]
fn waits_end_at_their_time_limits() {
    let (one, other) = Channel::pair().unwrap();
    assert!(matches!(other.try_recv::<u8>(), Err(ChannelError::WouldBlock)));
    assert!(matches!(other.recv_timeout::<u8>(Duration::from_millis(5)), Err(ChannelError::TimedOut)));
    let message = "x".repeat(10_000);
    while one.try_send(&message, &[]).is_ok() {}
    let full = one.send_timeout(&message, &[], Duration::from_millis(5));
    assert!(matches!(full, Err(ChannelError::TimedOut)));
    other.shutdown();
    assert!(matches!(one.send_timeout(&message, &[], Duration::from_secs(60)), Err(ChannelError::Gone)));
}

#[test]
fn other_descriptors_are_not_channels() {
    let (stream, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(matches!(Channel::try_from(OwnedFd::from(stream)), Err(ChannelError::NotAChannel)));
    assert!(matches!(Channel::try_from(marker().0), Err(ChannelError::NotAChannel)));
}
