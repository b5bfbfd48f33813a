//! The program in the helper's container, `landfall _helper`. It is the first process of the container, and may enter the
//! networks of others.
//!
//! Each accepted connection gets its own opener: a process that is started for that connection, enters the one requested
//! namespace, drops all privileges and ends with its channels. Only connections of one user are accepted. The privileges are
//! therefore held by this loop, which never reads a message, and by an opener for the duration of one request.
//!
//! Bounds: a connection without a prompt first message is closed, and a connection beyond the maximum number of openers is
//! refused. The helper ends by itself when it has been idle for a long time, for example after the daemon was killed.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use landfall_engine::channel::Channel;
use landfall_engine::opener::{Answer, Failure, FailureKind, VERB};
use rustix::net::RecvFlags;
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::process::Command;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::SOCKET;
use crate::sys::socket_file::appear;

/// The delay of accepting after descriptors or processes ran out.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);
/// The mode of the socket: accessible to its group, which includes the daemon's user, and to no other user.
const MODE: u32 = 0o660;

/// Limits and timeouts of the helper.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The maximum number of openers: one for each container that is forwarded.
    pub openers: usize,
    /// The maximum number of connections without a first message.
    pub pending: usize,
    /// The time limit for the first message.
    pub first_message_max: Duration,
    /// The time without connections after which the helper ends.
    pub idle: Duration,
}

impl Default for Bounds {
    fn default() -> Bounds {
        Bounds {
            openers: 512,
            pending: 32,
            first_message_max: Duration::from_secs(5),
            idle: Duration::from_secs(600),
        }
    }
}

/// Creates the socket in `directory`, in place of one of an earlier helper, and serves `user` there until it has been idle.
/// `program` is the executable of the openers.
///
/// # Errors
/// The errors of creating the socket. No other error ends the function.
pub async fn serve(directory: &Path, user: u32, program: &Path, bounds: Bounds) -> io::Result<()> {
    let (socket, _) = appear(directory, SOCKET, MODE)?;
    let socket = std::os::unix::net::UnixListener::from(socket);
    socket.set_nonblocking(true)?;
    // The socket has another type (SOCK_SEQPACKET), which does not affect accepting.
    let listener = UnixListener::from_std(socket)?;
    let openers = Arc::new(Semaphore::new(bounds.openers));
    let pending = Arc::new(Semaphore::new(bounds.pending));
    let mut clients = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = clients.join_next() => continue,
            () = sleep(bounds.idle), if clients.is_empty() => return Ok(()),
        };
        match accepted {
            Ok((client, _)) if client.peer_cred().is_ok_and(|peer| peer.uid() == user) => {
                // Close a connection beyond the limit. Only connections of the same user can exhaust it.
                let Ok(permit) = Arc::clone(&pending).try_acquire_owned() else { continue };
                let (openers, program) = (Arc::clone(&openers), program.to_owned());
                clients.spawn(async move {
                    let has_message = timeout(bounds.first_message_max, has_message(&client)).await;
                    drop(permit);
                    if has_message.unwrap_or(false) {
                        serve_client(client, &openers, program).await;
                    }
                });
            }
            Ok(_) => {}
            Err(_) => sleep(EXHAUSTED_PAUSE).await,
        }
    }
}

/// Waits for the first message without reading it. Returns whether one arrived.
async fn has_message(client: &UnixStream) -> bool {
    let peek = || {
        let mut byte = [0];
        Ok(rustix::net::recv(client, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT)?.1)
    };
    client.async_io(Interest::READABLE, peek).await.is_ok_and(|bytes| bytes > 0)
}

/// Passes the connection to an opener, and waits until it ends.
async fn serve_client(client: UnixStream, openers: &Semaphore, program: PathBuf) {
    let Ok(channel) = client.into_std().and_then(|client| {
        // An opener reads in blocking mode.
        client.set_nonblocking(false)?;
        Ok(OwnedFd::from(client))
    }) else {
        return;
    };
    let Ok(_permit) = openers.try_acquire() else {
        return refuse(channel, "the helper has reached its maximum number of openers".to_owned());
    };
    let Ok(theirs) = channel.try_clone() else {
        return refuse(channel, "the helper has no free descriptor".to_owned());
    };
    let child = Command::new(program)
        .arg0("landfall")
        .arg(VERB)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    match child {
        Ok(mut child) => {
            // The opener ends with its channels, so this copy must be closed.
            drop(channel);
            let _ = child.wait().await;
        }
        Err(error) => refuse(channel, format!("the helper cannot start an opener: {error}")),
    }
}

/// Answers the request without reading it. The client may have gone.
fn refuse(channel: OwnedFd, detail: String) {
    let failure = Failure { kind: FailureKind::Exhausted, detail };
    if let Ok(channel) = Channel::try_from(channel) {
        let _ = channel.try_send(&Answer::Failed { failure }, &[]);
    }
}

#[cfg(test)]
mod tests {
    use landfall_engine::channel::ChannelError;
    use landfall_engine::opener::{Request, TargetKind};
    use tempfile::TempDir;

    use super::*;

    const WAIT_MAX: Duration = Duration::from_secs(10);
    const BOUNDS: Bounds =
        Bounds { openers: 4, pending: 4, first_message_max: WAIT_MAX, idle: Duration::from_secs(600) };

    fn own_user() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    /// Starts a helper in its own directory, with a program that cannot be started.
    fn helper(user: u32, bounds: Bounds) -> (TempDir, JoinSet<io::Result<()>>) {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().to_owned();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { serve(&directory, user, Path::new("/no/such/program"), bounds).await });
        (folder, tasks)
    }

    /// Runs a client on a thread that may block.
    async fn on_client_thread<T: Send + 'static>(
        folder: &TempDir,
        action: impl FnOnce(&Path) -> T + Send + 'static,
    ) -> T {
        let path = folder.path().join(SOCKET);
        while !path.exists() {
            tokio::task::yield_now().await;
        }
        tokio::task::spawn_blocking(move || action(&path)).await.unwrap()
    }

    fn receive(channel: &Channel) -> Option<Answer> {
        match channel.recv_timeout(WAIT_MAX) {
            Ok(has_message) => has_message.map(|(answer, _)| answer),
            Err(ChannelError::Gone) => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn refusal(channel: &Channel) -> String {
        match receive(channel) {
            Some(Answer::Failed { failure }) => {
                assert_eq!(failure.kind, FailureKind::Exhausted);
                failure.detail
            }
            other => panic!("{other:?}"),
        }
    }

    const ENTER: Request = Request::Enter { target: TargetKind::Process };

    #[tokio::test]
    async fn another_user_is_refused_without_an_answer() {
        let (folder, _tasks) = helper(own_user() + 1, BOUNDS);
        on_client_thread(&folder, |path| {
            for _ in 0..100 {
                let channel = Channel::connect(path).unwrap();
                let _ = channel.send(&ENTER, &[]);
                assert_eq!(receive(&channel), None);
            }
        })
        .await;
    }

    #[tokio::test]
    async fn a_silent_client_is_disconnected_and_does_not_block_others() {
        let bounds = Bounds { pending: 2, first_message_max: Duration::from_millis(100), ..BOUNDS };
        let (folder, _tasks) = helper(own_user(), bounds);
        on_client_thread(&folder, |path| {
            let silent: Vec<_> = (0..20).map(|_| Channel::connect(path).unwrap()).collect();
            assert!(silent.iter().all(|channel| receive(channel).is_none()));
            let channel = Channel::connect(path).unwrap();
            channel.send(&ENTER, &[]).unwrap();
            assert!(refusal(&channel).contains("cannot start an opener"));
        })
        .await;
    }

    #[tokio::test]
    async fn a_client_beyond_the_maximum_number_of_openers_is_refused() {
        let (folder, _tasks) = helper(own_user(), Bounds { openers: 0, ..BOUNDS });
        on_client_thread(&folder, |path| {
            // The content of the message does not matter, since it is not read.
            for request in [serde_json::to_value(ENTER).unwrap(), serde_json::json!("let me in".repeat(400))]
            {
                let channel = Channel::connect(path).unwrap();
                channel.send(&request, &[]).unwrap();
                assert!(refusal(&channel).contains("maximum number of openers"));
            }
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn it_ends_after_its_idle_time() {
        let started = tokio::time::Instant::now();
        let (_folder, mut tasks) = helper(own_user(), BOUNDS);
        tasks.join_next().await.unwrap().unwrap().unwrap();
        assert_eq!(started.elapsed(), BOUNDS.idle);
    }

    #[tokio::test]
    async fn without_a_directory_it_does_not_start() {
        let served = serve(Path::new("/no/such/place"), 0, Path::new("/"), BOUNDS).await;
        assert!(served.is_err());
    }
}
