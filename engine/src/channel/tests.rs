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

/// A file that no other test has open, and its inode by which its descriptors are counted.
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
fn the_longest_message_passes_and_one_byte_more_is_refused() {
    let (one, other) = Channel::pair().unwrap();
    let longest = "x".repeat(MESSAGE_BYTES_MAX - 2);
    one.send(&longest, &[]).unwrap();
    assert_eq!(other.recv::<String>().unwrap().unwrap().0, longest);
    let error = one.send(&(longest + "x"), &[]).unwrap_err();
    assert!(matches!(error, ChannelError::TooLong { bytes } if bytes == MESSAGE_BYTES_MAX + 1));
}

#[test]
fn a_message_that_is_cut_is_refused_and_its_descriptors_are_closed() {
    let (one, other) = Channel::pair().unwrap();
    let (file, inode) = marker();
    one.send(&"x".repeat(200), &[file.as_fd(); 5]).unwrap();
    let error = receive::<String>(other.as_fd(), 100, RecvFlags::DONTWAIT).unwrap_err();
    assert!(matches!(error, ChannelError::Cut { bytes_max: 100 }));
    assert_eq!(open_descriptors_of_file(inode), 1);
}

#[test]
fn a_message_that_is_not_understood_is_refused_and_its_descriptors_are_closed() {
    let (one, other) = Channel::pair().unwrap();
    let (file, inode) = marker();
    send_bytes(one.as_fd(), b"{]", &[file.as_fd(); 5], SendFlags::empty()).unwrap();
    assert!(matches!(other.recv::<String>(), Err(ChannelError::Malformed(_))));
    assert_eq!(open_descriptors_of_file(inode), 1);
    one.send(&"and it still works", &[]).unwrap();
    assert!(other.recv::<String>().unwrap().is_some());
}

#[test]
fn what_was_sent_before_the_end_is_received_first() {
    let (one, other) = Channel::pair().unwrap();
    // An unread message makes the kernel report a reset ahead of what is still queued.
    other.send(&"never read", &[]).unwrap();
    one.send(&"last words", &[]).unwrap();
    drop(one);
    assert_eq!(other.recv::<String>().unwrap().unwrap().0, "last words");
    assert!(other.recv::<String>().unwrap().is_none());
    assert!(matches!(other.send(&1, &[]), Err(ChannelError::Gone)));
}

#[test]
fn waiting_is_bounded_where_asked() {
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
fn only_a_channel_is_taken_for_one() {
    let (stream, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(matches!(Channel::try_from(OwnedFd::from(stream)), Err(ChannelError::NotAChannel)));
    assert!(matches!(Channel::try_from(marker().0), Err(ChannelError::NotAChannel)));
}
