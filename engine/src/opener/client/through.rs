//! An opener that somebody else starts for us: a helper, which may enter what we may not.
//!
//! A helper listens on a Unix socket (`SOCK_SEQPACKET`), lets nobody but us connect, and gives each connection to an opener of
//! its own as that one's first channel. So the conversation is the same as with an opener that we start, and only who has
//! the privilege differs. A pidfd refers to its process in any process namespace (`pidfd_open(2)`), so a helper that does
//! not even see the process can enter its network.
//!
//! A helper is the same program as we are, and its openers are believed like our own. What is cheap to look at is looked at
//! all the same: the socket is no way that leads elsewhere, and the first socket that is made must be of the namespace that
//! was named.

use std::path::Path;

use super::agent::knock;
use super::{OpenError, Opener, Target, enter, refused};
use crate::opener::FailureKind;

impl Opener {
    /// Has an opener go to `target` that is started by the helper which listens at `socket`, and waits until it is inside.
    /// Waits for some seconds at most.
    ///
    /// # Errors
    /// [`OpenError::Helper`] where the helper could not be had, or what came from it is not to be believed; else as
    /// [`Opener::spawn`].
    pub fn through(socket: &Path, target: Target) -> Result<Opener, OpenError> {
        let unusable = |source| OpenError::Helper { socket: socket.to_owned(), source: Box::new(source) };
        let no_name = || refused(FailureKind::Other, "this is no path of a socket".to_owned());
        let (directory, name) = socket
            .parent()
            .zip(socket.file_name().and_then(|name| name.to_str()))
            .ok_or_else(|| unusable(no_name()))?;
        let channel = knock(directory, name, "helper").map_err(unusable)?;
        let (netns_inode, netns_cookie) = enter(&channel, &target).map_err(|error| match error {
            OpenError::Refused(_) => error,
            error => unusable(error),
        })?;
        let mut opener = Opener { channel, netns_inode, netns_cookie };
        opener.prove().map_err(unusable)?;
        Ok(opener)
    }
}
