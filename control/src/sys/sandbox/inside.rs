//! The inner process of a sandbox: `landfall _sandbox`. Single-threaded from its start to its `exec`.

use std::convert::Infallible;
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use landfall_engine::native;
use landfall_engine::sys::netns_cookie;
use nix::sched::CloneFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};
use rustix::process::Signal;

use super::link;
use super::wire::{self, Message, Step};
use crate::sys::event_loop;

/// Runs the inner half of the protocol. Returns only if the command did not start; the outer process has received the
/// reason.
pub fn main(command: &[OsString]) {
    // Above the three standard descriptors, and closed by `exec`.
    let Ok(channel) = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) else { return };
    if let Err(Some((step, errno))) = become_command(&channel, command) {
        let errno = errno.raw_os_error();
        let _ = wire::send(&channel, Message::Failed { step, errno });
    }
}

/// Returns the step that failed; `None` if the outer process is gone.
fn become_command(
    channel: &std::os::fd::OwnedFd,
    command: &[OsString],
) -> Result<Infallible, Option<(Step, Errno)>> {
    let at = |step: Step| move |errno: Errno| Some((step, errno));
    let input = wire::receive_descriptor(channel).map_err(at(Step::Input))?.ok_or(None)?;
    rustix::stdio::dup2_stdin(&input).map_err(at(Step::Input))?;
    drop(input);

    let user = unshare().map_err(at(Step::Unshare))?;
    send_message(channel, Message::Unshared { user })?;
    expect_message(channel, Message::Mapped)?;
    link::bring_loopback_up().map_err(at(Step::Loopback))?;
    send_message(channel, Message::Ready)?;
    let mut due = wire::receive(channel).map_err(|_| None)?;
    if due == Some(Message::Filter) {
        install_filter(channel)?;
        due = wire::receive(channel).map_err(|_| None)?;
    }
    due.filter(|message| *message == Message::Go).ok_or(None)?;

    let (program, arguments) = command.split_first().ok_or(None)?;
    // If landfall is killed, the command gets SIGTERM. This is set last, since a change of credentials, such as
    // entering a user namespace, may clear it. If the parent died before this, the next message fails.
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM)).map_err(at(Step::ParentDeath))?;
    event_loop::unblock().map_err(|_| Some((Step::Signals, Errno::INVAL)))?;
    let error = Command::new(program).args(arguments).exec();
    Err(Some((Step::Exec, error.raw_os_error().map_or(Errno::NOENT, Errno::from_raw_os_error))))
}

/// Installs the filter of native sockets, and sends the descriptor of its notifications to the outer process. A refusal
/// of the kernel is reported and is not a failure.
fn install_filter(channel: &std::os::fd::OwnedFd) -> Result<(), Option<(Step, Errno)>> {
    let notifications = match native::install() {
        Ok(notifications) => notifications,
        Err(error) => return send_message(channel, Message::NotFiltered { error }),
    };
    // A socket belongs to the network namespace in which it was created, so the channel's cookie is that of the outer
    // one.
    let inside = rustix::net::socket(AddressFamily::UNIX, SocketType::DGRAM, None);
    let cookie = inside.map_err(std::io::Error::from).and_then(netns_cookie);
    let netns_cookie =
        cookie.map_err(|error| Some((Step::Filter, Errno::from_io_error(&error).unwrap_or(Errno::IO))))?;
    send_message(channel, Message::Filtered { netns_cookie })?;
    wire::send_descriptor(channel, notifications.as_fd()).map_err(|errno| Some((Step::Filter, errno)))
}

/// Creates the namespaces. Returns whether a user namespace is among them: root does without one if they are forbidden.
fn unshare() -> Result<bool, Errno> {
    let flags = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET;
    let Err(refused) = nix::sched::unshare(flags) else { return Ok(true) };
    if rustix::process::geteuid().is_root() && nix::sched::unshare(CloneFlags::CLONE_NEWNET).is_ok() {
        return Ok(false);
    }
    Err(Errno::from_raw_os_error(refused as i32))
}

fn send_message(channel: &std::os::fd::OwnedFd, message: Message) -> Result<(), Option<(Step, Errno)>> {
    wire::send(channel, message).map_err(|_| None)
}

fn expect_message(channel: &std::os::fd::OwnedFd, due: Message) -> Result<(), Option<(Step, Errno)>> {
    match wire::receive(channel) {
        Ok(Some(message)) if message == due => Ok(()),
        _ => Err(None),
    }
}
