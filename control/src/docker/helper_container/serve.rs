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
use crate::sys::socket_file::appear;

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

#[cfg(test)]
mod tests {
    use landfall_engine::channel::ChannelError;
    use landfall_engine::opener::{Request, TargetKind};
    use tempfile::TempDir;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);
    const BOUNDS: Bounds =
        Bounds { openers: 4, knocking: 4, patience: PATIENCE, idle: Duration::from_secs(600) };

    fn own_user() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    /// A helper in a directory of its own, with a program that cannot be started.
    fn helper(user: u32, bounds: Bounds) -> (TempDir, JoinSet<io::Result<()>>) {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().to_owned();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { serve(&directory, user, Path::new("/no/such/program"), bounds).await });
        (folder, tasks)
    }

    /// What a client does, on a thread that may wait.
    async fn client<T: Send + 'static>(
        folder: &TempDir,
        does: impl FnOnce(&Path) -> T + Send + 'static,
    ) -> T {
        let path = folder.path().join(SOCKET);
        while !path.exists() {
            tokio::task::yield_now().await;
        }
        tokio::task::spawn_blocking(move || does(&path)).await.unwrap()
    }

    fn says(channel: &Channel) -> Option<Answer> {
        match channel.recv_timeout(PATIENCE) {
            Ok(said) => said.map(|(answer, _)| answer),
            Err(ChannelError::Gone) => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn refusal(channel: &Channel) -> String {
        match says(channel) {
            Some(Answer::Failed { failure }) => {
                assert_eq!(failure.kind, FailureKind::Exhausted);
                failure.detail
            }
            other => panic!("{other:?}"),
        }
    }

    const ENTER: Request = Request::Enter { target: TargetKind::Process };

    #[tokio::test]
    async fn another_user_is_turned_away_unheard() {
        let (folder, _tasks) = helper(own_user() + 1, BOUNDS);
        client(&folder, |path| {
            for _ in 0..100 {
                let channel = Channel::connect(path).unwrap();
                let _ = channel.send(&ENTER, &[]);
                assert_eq!(says(&channel), None);
            }
        })
        .await;
    }

    #[tokio::test]
    async fn who_says_nothing_is_turned_away_and_stops_nobody() {
        let bounds = Bounds { knocking: 2, patience: Duration::from_millis(100), ..BOUNDS };
        let (folder, _tasks) = helper(own_user(), bounds);
        client(&folder, |path| {
            let silent: Vec<_> = (0..20).map(|_| Channel::connect(path).unwrap()).collect();
            assert!(silent.iter().all(|channel| says(channel).is_none()));
            let channel = Channel::connect(path).unwrap();
            channel.send(&ENTER, &[]).unwrap();
            assert!(refusal(&channel).contains("cannot start an opener"));
        })
        .await;
    }

    #[tokio::test]
    async fn with_every_opener_in_use_the_next_one_is_told() {
        let (folder, _tasks) = helper(own_user(), Bounds { openers: 0, ..BOUNDS });
        client(&folder, |path| {
            // What is sent makes no difference, since nobody reads it.
            for request in [serde_json::to_value(ENTER).unwrap(), serde_json::json!("let me in".repeat(400))]
            {
                let channel = Channel::connect(path).unwrap();
                channel.send(&request, &[]).unwrap();
                assert!(refusal(&channel).contains("as many namespaces"));
            }
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn it_ends_when_nobody_comes() {
        let began = tokio::time::Instant::now();
        let (_folder, mut tasks) = helper(own_user(), BOUNDS);
        tasks.join_next().await.unwrap().unwrap().unwrap();
        assert_eq!(began.elapsed(), BOUNDS.idle);
    }

    #[tokio::test]
    async fn without_a_directory_it_does_not_start() {
        let served = serve(Path::new("/no/such/place"), 0, Path::new("/"), BOUNDS).await;
        assert!(served.is_err());
    }
}
