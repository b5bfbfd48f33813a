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

use super::agent::{OWN_NAMESPACE, knock, own_cookie};
use super::{OpenError, Opener, Target, enter, refused};
use crate::channel::Channel;
use crate::opener::FailureKind;

/// Whether a helper listens at `socket`. Never waits.
///
/// # Errors
/// [`OpenError::Helper`] with what is wrong.
pub fn helper_listens(socket: &Path) -> Result<(), OpenError> {
    reach(socket).map(drop)
}

impl Opener {
    /// Has an opener go to `target` that is started by the helper which listens at `socket`, and waits until it is inside.
    /// Waits for some seconds at most.
    ///
    /// # Errors
    /// [`OpenError::Helper`] where the helper could not be had, or what came from it is not to be believed; else as
    /// [`Opener::spawn`].
    pub fn through(socket: &Path, target: Target) -> Result<Opener, OpenError> {
        let unusable = |source| unusable(socket, source);
        let channel = reach(socket)?;
        let (netns_inode, netns_cookie) = enter(&channel, &target).map_err(|error| match error {
            OpenError::Refused(_) => error,
            error => unusable(error),
        })?;
        if own_cookie()? == netns_cookie {
            return Err(refused(FailureKind::OwnNamespace, OWN_NAMESPACE.to_owned()));
        }
        let mut opener = Opener { channel, netns_inode, netns_cookie };
        opener.prove().map_err(unusable)?;
        Ok(opener)
    }
}

fn unusable(socket: &Path, source: OpenError) -> OpenError {
    OpenError::Helper { socket: socket.to_owned(), source: Box::new(source) }
}

fn reach(socket: &Path) -> Result<Channel, OpenError> {
    let name = socket.file_name().and_then(|name| name.to_str());
    let reached = match socket.parent().zip(name) {
        Some((directory, name)) => knock(directory, name, "helper"),
        None => Err(refused(FailureKind::Other, "this is no path of a socket".to_owned())),
    };
    reached.map_err(|source| unusable(socket, source))
}
