//! Finds the holder of a port of this machine, for messages: a port that cannot be bound, or one that a secret would reach.

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU16;

use serde::{Deserialize, Serialize};

use super::users::{Holder, is_ours};
use crate::sys::processes;

/// A port that another process holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HeldPort {
    /// The address at which it was to be bound.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// The user who holds it, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Process and user as text, as far as known.
    pub holder: String,
}

impl HeldPort {
    /// Returns the holder of a port if it is neither root nor our user.
    pub async fn of_stranger(address: IpAddr, port: NonZeroU16) -> Option<HeldPort> {
        let held = HeldPort::look_up(address, port.get()).await;
        held.filter(|held| held.uid.is_some_and(|uid| !is_ours(uid)))
    }

    /// Returns the holder of a port that could not be bound. An unknown holder is "another process".
    pub(crate) async fn of_taken(address: IpAddr, port: u16) -> HeldPort {
        let unknown = HeldPort { address, port, uid: None, holder: "another process".to_owned() };
        HeldPort::look_up(address, port).await.unwrap_or(unknown)
    }

    /// Returns the holder of a port, if a process listens on it.
    pub(crate) async fn look_up(address: IpAddr, port: u16) -> Option<HeldPort> {
        let wanted = NonZeroU16::new(port)?;
        let looked = tokio::task::spawn_blocking(move || processes::listener_at(address, wanted)).await;
        let (uid, inode) = looked.ok().flatten()?;
        let mut holder = Holder { uid, inode, process: None };
        holder.find_process().await;
        Some(HeldPort { address, port, uid: Some(uid), holder: holder.to_string() })
    }
}

impl fmt::Display for HeldPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "port {} of {} is held by {}", self.port, self.address, self.holder)
    }
}
