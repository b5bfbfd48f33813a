//! `devcontainer.json`, and the label with the same content: no input ends the daemon, and the parsed result survives a
//! round trip through the wire format.

#![no_main]

use landfall::launch::devcontainer::{Devcontainer, from_metadata};
use landfall::model::port_policy::PortForward;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = Devcontainer::parse(text);
    let Ok(parsed) = from_metadata(text, None) else { return };
    if let Some(policy) = parsed.port_forward() {
        let wire = serde_json::to_value(&policy).unwrap();
        assert_eq!(PortForward::from_value(&wire), Ok(policy), "{wire}");
    }
    if let Some(wire) = parsed.ports_as_metadata() {
        let read = from_metadata(&wire.to_string(), None).map(|read| read.port_forward());
        assert_eq!(read, Ok(parsed.port_forward()), "{wire}");
    }
    for note in parsed.notes() {
        assert!(note.first <= note.last, "{note:?}");
    }
});
