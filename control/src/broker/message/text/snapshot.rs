//! Parses `port-listen-snapshot` in one pass over the text, keeping only the first entry of each port. Pure.
//!
//! The result has at most 65,535 entries. An entry that is not a listener is skipped without building a value: a
//! message of 16 MiB may contain millions of them.

use std::collections::HashSet;
use std::fmt;
use std::num::NonZeroU16;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{LOOPBACK, Scalar, Unreadable};
use crate::model::announcement::Announced;

/// Returns the listeners of a snapshot, in the order of the message.
///
/// # Errors
/// [`Unreadable::Field`] if `ports` is missing or not a list.
pub(super) fn snapshot(text: &str) -> Result<Vec<Announced>, Unreadable> {
    let unfit = Unreadable::Field { kind: "port-listen-snapshot", field: "ports" };
    let read: Result<Snapshot, _> = serde_json::from_str(text);
    read.map(|snapshot| snapshot.ports.0)
        .map_err(|error| if error.is_data() { unfit } else { Unreadable::Json })
}

#[derive(Deserialize)]
struct Snapshot {
    ports: Ports,
}

struct Ports(Vec<Announced>);

impl<'de> Deserialize<'de> for Ports {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Ports, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Ports;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Ports, A::Error> {
                let (mut seen, mut ports) = (HashSet::new(), Vec::new());
                while let Some(Entry(entry)) = list.next_element()? {
                    ports.extend(entry.filter(|announced| seen.insert(announced.port)));
                }
                Ok(Ports(ports))
            }
        }
        deserializer.deserialize_seq(List)
    }
}

/// A listener: an object with `port` and `bindAddr`. Unless `bindAddr` is the loopback address, the port counts as
/// listening on all addresses. Any other value is skipped.
struct Entry(Option<Announced>);

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entry, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Entry;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("anything")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entry, A::Error> {
                let (mut port, mut loopback) = (None, false);
                while let Some(name) = map.next_key::<Scalar<'_>>()? {
                    match name.as_str() {
                        Some("port") => port = map.next_value::<Scalar<'_>>()?.as_integer(),
                        Some("bindAddr") => {
                            loopback = map.next_value::<Scalar<'_>>()?.as_str() == Some(LOOPBACK);
                        }
                        _ => _ = map.next_value::<IgnoredAny>()?,
                    }
                }
                let port = port.and_then(|port| u16::try_from(port).ok()).and_then(NonZeroU16::new);
                Ok(Entry(port.map(|port| Announced { port, loopback })))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Entry, A::Error> {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Entry(None))
            }

            fn visit_str<E>(self, _: &str) -> Result<Entry, E> {
                Ok(Entry(None))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Entry, E> {
                Ok(Entry(None))
            }

            fn visit_u64<E>(self, _: u64) -> Result<Entry, E> {
                Ok(Entry(None))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Entry, E> {
                Ok(Entry(None))
            }

            fn visit_bool<E>(self, _: bool) -> Result<Entry, E> {
                Ok(Entry(None))
            }

            fn visit_unit<E>(self) -> Result<Entry, E> {
                Ok(Entry(None))
            }
        }
        deserializer.deserialize_any(Any)
    }
}
