//! The helper itself, `landfall _helper`: the first process of a container of its own, which may enter the network of others.
//!
//! Whoever connects to its socket and is the one user that it obeys has one opener to talk to, a process that is started for that
//! connection, enters the one namespace that is asked for, gives up every privilege and ends with its channels. So the privilege is
//! held by this loop, which reads nothing that is sent to it, and for the length of one request by an opener.
//!
//! What bounds it: who does not say at once where to go is turned away, and so is who comes when there are as many openers
//! as there may be. It ends by itself when nobody has come for a long time, as when the daemon was killed and never came
//! back.

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
use crate::agent::directory::appear;

/// How long nobody is taken in after descriptors or processes ran out.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);
/// The socket is for its group, which the daemon's user is in, and for nobody else.
const MODE: u32 = 0o660;

/// How much it does at a time, and how long it waits.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Namespaces that are entered: one for each container that is forwarded.
    pub openers: usize,
    /// Connections on which nothing was said yet.
    pub knocking: usize,
    /// How long one of those may last.
    pub patience: Duration,
    /// How long it serves nobody.
    pub idle: Duration,
}

impl Default for Bounds {
    fn default() -> Bounds {
        Bounds {
            openers: 512,
            knocking: 32,
            patience: Duration::from_secs(5),
            idle: Duration::from_secs(600),
        }
    }
}

/// Makes the socket in `directory`, in the place of one that an earlier helper left, and serves `user` there until nobody has
/// come for long. `program` becomes the openers.
///
/// # Errors
/// Those of the socket; nothing else ends it.
pub async fn serve(directory: &Path, user: u32, program: &Path, bounds: Bounds) -> io::Result<()> {
    let (socket, _) = appear(directory, SOCKET, MODE)?;
    let socket = std::os::unix::net::UnixListener::from(socket);
    socket.set_nonblocking(true)?;
    // It is of another type (SOCK_SEQPACKET), which makes no difference to accepting.
    let listener = UnixListener::from_std(socket)?;
    let openers = Arc::new(Semaphore::new(bounds.openers));
    let knocking = Arc::new(Semaphore::new(bounds.knocking));
    let mut guests = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = guests.join_next() => continue,
            () = sleep(bounds.idle), if guests.is_empty() => return Ok(()),
        };
        match accepted {
            Ok((guest, _)) if guest.peer_cred().is_ok_and(|peer| peer.uid() == user) => {
                // One that finds no place to wait is turned away: only its own user can be in its way.
                let Ok(place) = Arc::clone(&knocking).try_acquire_owned() else { continue };
                let (openers, program) = (Arc::clone(&openers), program.to_owned());
                guests.spawn(async move {
                    let said = timeout(bounds.patience, says_something(&guest)).await;
                    drop(place);
                    if said.unwrap_or(false) {
                        attend(guest, &openers, program).await;
                    }
                });
            }
            Ok(_) => {}
            Err(_) => sleep(EXHAUSTED_PAUSE).await,
        }
    }
}

/// Waits for the first message, and leaves it where it is; whether there is one.
async fn says_something(guest: &UnixStream) -> bool {
    let peek = || {
        let mut byte = [0];
        Ok(rustix::net::recv(guest, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT)?.1)
    };
    guest.async_io(Interest::READABLE, peek).await.is_ok_and(|bytes| bytes > 0)
}

/// Gives the connection to an opener, and waits for its end.
async fn attend(guest: UnixStream, openers: &Semaphore, program: PathBuf) {
    let Ok(channel) = guest.into_std().and_then(|guest| {
        // An opener waits for what it reads first.
        guest.set_nonblocking(false)?;
        Ok(OwnedFd::from(guest))
    }) else {
        return;
    };
    let Ok(_place) = openers.try_acquire() else {
        return refuse(channel, "as many namespaces are entered through the helper as may be".to_owned());
    };
    let Ok(theirs) = channel.try_clone() else {
        return refuse(channel, "the helper has no more descriptors".to_owned());
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
            // It ends with its channels, of which this is one.
            drop(channel);
            let _ = child.wait().await;
        }
        Err(error) => refuse(channel, format!("the helper cannot start an opener: {error}")),
    }
}

/// Answers the request that nobody has read. Whoever asked may be gone.
fn refuse(channel: OwnedFd, detail: String) {
    let failure = Failure { kind: FailureKind::Exhausted, detail };
    if let Ok(channel) = Channel::try_from(channel) {
        let _ = channel.try_send(&Answer::Failed { failure }, &[]);
    }
}
