//! Messages as text: one JSON object each. Pure.
//!
//! `relay-data` is nearly all of the volume. It is parsed in one pass over the text, with its base64 borrowed from the
//! text, and written without an intermediate value. A snapshot can list every port, and is parsed without an
//! intermediate value, too. All other messages are rare and are parsed as a [`Value`], which takes up to 32 bytes of
//! memory for two bytes of text, so their length is limited.

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::num::NonZeroU16;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Value, json};

use super::{
    Announced, Credential, Extensions, ForwardResult, Frame, Side, StreamId, ToContainer, ToHost, Unreadable,
};
use crate::broker::message::text::snapshot::snapshot;
use crate::model::port_policy::port_of;

mod snapshot;

/// The longest message that is parsed as a [`Value`], in bytes. The longest of the reference implementation has ten
/// host ports and a sentence.
const FIELDS_BYTES_MAX: usize = 64 * 1024;

const LOOPBACK: &str = "127.0.0.1";
const EVERY_ADDRESS: &str = "0.0.0.0";

impl ToContainer {
    /// Parses a message. `Ok(None)` is a message of an unknown type, or without a type.
    ///
    /// # Errors
    /// [`Unreadable`].
    pub fn from_text(text: &str) -> Result<Option<ToContainer>, Unreadable> {
        let head = Head::read(text)?;
        if let Some((stream, frame)) = head.relay(Side::Downstream)? {
            return Ok(Some(ToContainer::Relay(stream, frame)));
        }
        let Some(kind) = head.kind.as_str() else { return Ok(None) };
        let message = match kind {
            "port-watch-subscribe" => ToContainer::Subscribe,
            "port-watch-unsubscribe" => ToContainer::Unsubscribe,
            "broker-hello" => {
                let fields = Fields::read("broker-hello", text)?;
                let credential = match fields.value("proof") {
                    Value::String(proof) => Credential::Proof(proof.clone()),
                    _ => Credential::Token(fields.string("token")?),
                };
                ToContainer::Hello { credential, extensions: fields.extensions() }
            }
            "port-forward-result" => {
                let fields = Fields::read("port-forward-result", text)?;
                let result = match fields.value("ok") {
                    Value::Bool(true) => Ok(fields.port("hostPort")?),
                    Value::Bool(false) => Err(fields.reason()),
                    _ => return Err(fields.unfit("ok")),
                };
                ToContainer::ForwardResult(ForwardResult { port: fields.port("port")?, result })
            }
            "relay-open" => {
                let stream = head.stream("relay-open")?;
                ToContainer::Open { stream, port: Fields::read("relay-open", text)?.port("port")? }
            }
            _ => return Ok(None),
        };
        Ok(Some(message))
    }

    /// Formats the message.
    #[must_use]
    pub fn to_text(&self) -> String {
        match self {
            ToContainer::Hello { credential, extensions } => {
                let hello = match credential {
                    Credential::Token(token) => json!({"type": "broker-hello", "token": token}),
                    Credential::Proof(proof) => json!({"type": "broker-hello", "proof": proof}),
                };
                with_extensions(hello, *extensions)
            }
            ToContainer::Subscribe => json!({"type": "port-watch-subscribe"}),
            ToContainer::Unsubscribe => json!({"type": "port-watch-unsubscribe"}),
            ToContainer::ForwardResult(ForwardResult { port, result }) => match result {
                Ok(host_port) => {
                    json!({"type": "port-forward-result", "port": port, "ok": true, "hostPort": host_port})
                }
                Err(reason) => {
                    json!({"type": "port-forward-result", "port": port, "ok": false, "reason": reason})
                }
            },
            ToContainer::Open { stream, port } => {
                json!({"type": "relay-open", "streamId": stream.0, "port": port})
            }
            ToContainer::Relay(stream, frame) => return relay_text(*stream, frame),
        }
        .to_string()
    }
}

impl ToHost {
    /// Parses a message. `Ok(None)` is a message of an unknown type, or without a type.
    ///
    /// # Errors
    /// [`Unreadable`].
    pub fn from_text(text: &str) -> Result<Option<ToHost>, Unreadable> {
        let head = Head::read(text)?;
        if let Some((stream, frame)) = head.relay(Side::Upstream)? {
            return Ok(Some(ToHost::Relay(stream, frame)));
        }
        let Some(kind) = head.kind.as_str() else { return Ok(None) };
        let message = match kind {
            "broker-hello-ack" => {
                ToHost::HelloAck { extensions: Fields::read("broker-hello-ack", text)?.extensions() }
            }
            "broker-hello-nack" => {
                ToHost::HelloNack { reason: Fields::read("broker-hello-nack", text)?.reason() }
            }
            "port-forward-request" => {
                let fields = Fields::read("port-forward-request", text)?;
                let candidates = fields.list("hostCandidates")?.iter().filter_map(port_of).collect();
                let reason = fields.value("reason").as_str().map(str::to_owned);
                ToHost::ForwardRequest { target: fields.port("targetPort")?, candidates, reason }
            }
            "port-listen-snapshot" => ToHost::Snapshot(snapshot(text)?),
            "port-listen-opened" => {
                let fields = Fields::read("port-listen-opened", text)?;
                let loopback = fields.value("bindAddr") == LOOPBACK;
                ToHost::Opened(Announced { port: fields.port("port")?, loopback })
            }
            "port-listen-closed" => ToHost::Closed(Fields::read("port-listen-closed", text)?.port("port")?),
            "relay-open-ack" => ToHost::OpenAck(head.stream("relay-open-ack")?),
            "relay-open-nack" => {
                let stream = head.stream("relay-open-nack")?;
                ToHost::OpenNack { stream, reason: Fields::read("relay-open-nack", text)?.reason() }
            }
            _ => return Ok(None),
        };
        Ok(Some(message))
    }

    /// Formats the message.
    #[must_use]
    pub fn to_text(&self) -> String {
        match self {
            ToHost::HelloAck { extensions } => {
                with_extensions(json!({"type": "broker-hello-ack"}), *extensions)
            }
            ToHost::HelloNack { reason } => json!({"type": "broker-hello-nack", "reason": reason}),
            ToHost::ForwardRequest { target, candidates, reason } => {
                let mut value = json!({
                    "type": "port-forward-request", "targetPort": target, "hostCandidates": candidates,
                });
                if let Some(reason) = reason {
                    value["reason"] = json!(reason);
                }
                value
            }
            ToHost::Snapshot(ports) => {
                let ports: Vec<Value> = ports
                    .iter()
                    .map(|announced| json!({"port": announced.port, "bindAddr": bind_address(*announced)}))
                    .collect();
                json!({"type": "port-listen-snapshot", "ports": ports})
            }
            ToHost::Opened(announced) => {
                json!({"type": "port-listen-opened", "port": announced.port, "bindAddr": bind_address(*announced)})
            }
            ToHost::Closed(port) => json!({"type": "port-listen-closed", "port": port}),
            ToHost::OpenAck(stream) => json!({"type": "relay-open-ack", "streamId": stream.0}),
            ToHost::OpenNack { stream, reason } => {
                json!({"type": "relay-open-nack", "streamId": stream.0, "reason": reason})
            }
            ToHost::Relay(stream, frame) => return relay_text(*stream, frame),
        }
        .to_string()
    }
}

/// Formats a frame of a stream as text; the format is the same in both directions.
#[must_use]
pub fn relay_text(stream: StreamId, frame: &Frame) -> String {
    let StreamId(id) = stream;
    match frame {
        Frame::Data(payload) => {
            let mut text = String::with_capacity(64 + payload.len().div_ceil(3) * 4);
            // Writing into a String cannot fail.
            let _ = write!(text, r#"{{"type":"relay-data","streamId":{id},"bytes":""#);
            STANDARD.encode_string(payload, &mut text);
            text.push_str("\"}");
            text
        }
        Frame::Close(side) => {
            let side = match side {
                Side::Downstream => "downstream",
                Side::Upstream => "upstream",
            };
            format!(r#"{{"type":"relay-close","streamId":{id},"side":"{side}"}}"#)
        }
        Frame::Credit(bytes) => format!(r#"{{"type":"relay-credit","streamId":{id},"bytes":{bytes}}}"#),
        Frame::Eof => format!(r#"{{"type":"relay-eof","streamId":{id}}}"#),
        Frame::Reset => format!(r#"{{"type":"relay-reset","streamId":{id}}}"#),
    }
}

fn with_extensions(mut value: Value, extensions: Extensions) -> Value {
    if extensions != Extensions::NONE {
        let listed = [
            ("binary", extensions.binary),
            ("credit", extensions.credit),
            ("half-close", extensions.half_close),
            ("reset", extensions.reset),
        ];
        value["extensions"] = listed.iter().filter(|(_, has)| *has).map(|(name, _)| *name).collect();
    }
    value
}

fn bind_address(announced: Announced) -> &'static str {
    if announced.loopback { LOOPBACK } else { EVERY_ADDRESS }
}

/// A message of a rare type, as a [`Value`].
struct Fields {
    kind: &'static str,
    value: Value,
}

impl Fields {
    fn read(kind: &'static str, text: &str) -> Result<Fields, Unreadable> {
        if text.len() > FIELDS_BYTES_MAX {
            return Err(Unreadable::TooLong { kind, bytes: text.len() });
        }
        Ok(Fields { kind, value: serde_json::from_str(text).map_err(|_| Unreadable::Json)? })
    }

    /// Returns a field; null if it is missing.
    fn value(&self, field: &'static str) -> &Value {
        &self.value[field]
    }

    fn unfit(&self, field: &'static str) -> Unreadable {
        Unreadable::Field { kind: self.kind, field }
    }

    fn string(&self, field: &'static str) -> Result<String, Unreadable> {
        self.value(field).as_str().map(str::to_owned).ok_or_else(|| self.unfit(field))
    }

    fn port(&self, field: &'static str) -> Result<NonZeroU16, Unreadable> {
        port_of(self.value(field)).ok_or_else(|| self.unfit(field))
    }

    fn list(&self, field: &'static str) -> Result<&[Value], Unreadable> {
        self.value(field).as_array().map(Vec::as_slice).ok_or_else(|| self.unfit(field))
    }

    /// Returns the reason of a refusal; empty if it is missing.
    fn reason(&self) -> String {
        self.value("reason").as_str().unwrap_or_default().to_owned()
    }

    fn extensions(&self) -> Extensions {
        let listed = self.value("extensions").as_array().map(Vec::as_slice).unwrap_or_default();
        let has = |name: &str| listed.iter().any(|listed| listed == name);
        Extensions {
            binary: has("binary"),
            credit: has("credit"),
            half_close: has("half-close"),
            reset: has("reset"),
        }
    }
}

/// The fields that are parsed first for every message: its type, and the fields of frames. If a name occurs twice, its
/// last value is used, as in the JSON parser of the peer.
#[derive(Default)]
struct Head<'a> {
    kind: Scalar<'a>,
    stream: Scalar<'a>,
    bytes: Scalar<'a>,
    side: Scalar<'a>,
}

impl<'a> Head<'a> {
    /// Parses the fields. All of them are absent in JSON that is not an object.
    fn read(text: &'a str) -> Result<Head<'a>, Unreadable> {
        match serde_json::from_str(text) {
            Err(error) if error.is_data() => Ok(Head::default()),
            read => read.map_err(|_| Unreadable::Json),
        }
    }

    fn stream(&self, kind: &'static str) -> Result<StreamId, Unreadable> {
        self.stream.as_integer().map(StreamId).ok_or(Unreadable::Field { kind, field: "streamId" })
    }

    /// Returns the frame, if the message is one. `sender` is the side that sent it.
    fn relay(&self, sender: Side) -> Result<Option<(StreamId, Frame)>, Unreadable> {
        let relay = |kind: &'static str, frame: Frame| Ok(Some((self.stream(kind)?, frame)));
        match self.kind.as_str() {
            Some("relay-data") => {
                let unfit = Unreadable::Field { kind: "relay-data", field: "bytes" };
                let text = self.bytes.as_str().ok_or(unfit)?;
                let payload = STANDARD.decode(text).map_err(|_| unfit)?;
                relay("relay-data", Frame::Data(Bytes::from(payload)))
            }
            Some("relay-close") => {
                let side = match self.side.as_str() {
                    Some("downstream") => Side::Downstream,
                    Some("upstream") => Side::Upstream,
                    _ => sender,
                };
                relay("relay-close", Frame::Close(side))
            }
            Some("relay-credit") => {
                let bytes = self.bytes.as_integer().and_then(|bytes| u32::try_from(bytes).ok());
                let unfit = Unreadable::Field { kind: "relay-credit", field: "bytes" };
                relay("relay-credit", Frame::Credit(bytes.ok_or(unfit)?))
            }
            Some("relay-eof") => relay("relay-eof", Frame::Eof),
            Some("relay-reset") => relay("relay-reset", Frame::Reset),
            _ => Ok(None),
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Head<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Head<'a>, D::Error> {
        struct Whole;
        impl<'de> Visitor<'de> for Whole {
            type Value = Head<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a message")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Head<'de>, A::Error> {
                let mut head = Head::default();
                while let Some(Scalar::Text(name)) = map.next_key()? {
                    match &*name {
                        "type" => head.kind = map.next_value()?,
                        "streamId" => head.stream = map.next_value()?,
                        "bytes" => head.bytes = map.next_value()?,
                        "side" => head.side = map.next_value()?,
                        _ => _ = map.next_value::<IgnoredAny>()?,
                    }
                }
                Ok(head)
            }
        }
        deserializer.deserialize_map(Whole)
    }
}

/// A value of which only text and integers are used.
#[derive(Default)]
enum Scalar<'a> {
    Text(Cow<'a, str>),
    Integer(i64),
    #[default]
    Other,
}

impl Scalar<'_> {
    fn as_str(&self) -> Option<&str> {
        match self {
            Scalar::Text(text) => Some(text),
            _ => None,
        }
    }

    fn as_integer(&self) -> Option<i64> {
        match self {
            Scalar::Integer(number) => Some(*number),
            _ => None,
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Scalar<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Scalar<'a>, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Scalar<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("anything")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Scalar<'de>, E> {
                Ok(Scalar::Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Scalar<'de>, E> {
                Ok(Scalar::Text(Cow::Owned(text.to_owned())))
            }

            fn visit_i64<E>(self, number: i64) -> Result<Scalar<'de>, E> {
                Ok(Scalar::Integer(number))
            }

            fn visit_u64<E>(self, number: u64) -> Result<Scalar<'de>, E> {
                Ok(i64::try_from(number).map_or(Scalar::Other, Scalar::Integer))
            }

            fn visit_f64<E>(self, number: f64) -> Result<Scalar<'de>, E> {
                Ok(whole(number).map_or(Scalar::Other, Scalar::Integer))
            }

            fn visit_bool<E>(self, _: bool) -> Result<Scalar<'de>, E> {
                Ok(Scalar::Other)
            }

            fn visit_unit<E>(self) -> Result<Scalar<'de>, E> {
                Ok(Scalar::Other)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Scalar<'de>, A::Error> {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Scalar::Other)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Scalar<'de>, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Scalar::Other)
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// Returns the integer that equals a number with a decimal point, such as 1.0.
fn whole(number: f64) -> Option<i64> {
    // Both bounds are powers of two, so they are exact.
    const BOUND: f64 = 9_223_372_036_854_775_808.0;
    #[expect(clippy::cast_possible_truncation, reason = "it is a whole number within the bounds of i64")]
    let whole = || number as i64;
    (number.fract() == 0.0 && (-BOUND..BOUND).contains(&number)).then(whole)
}

#[cfg(test)]
mod tests;
