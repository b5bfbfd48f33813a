//! `devcontainer.json`, and the label with the same content: no input ends the daemon, and the parsed result survives a
//! round trip through the wire format.

#![no_main]

use landfall::launch::devcontainer::{Devcontainer, from_metadata};
use landfall::model::port_policy::PortForward;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = Devcontainer::parse(text);
    let Ok(said) = from_metadata(text, None) else { return };
    if let Some(policy) = said.port_forward() {
        let told = serde_json::to_value(&policy).unwrap();
        assert_eq!(PortForward::from_value(&told), Ok(policy), "{told}");
    }
    if let Some(told) = said.ports_as_metadata() {
        let read = from_metadata(&told.to_string(), None).map(|read| read.port_forward());
        assert_eq!(read, Ok(said.port_forward()), "{told}");
    }
    for note in said.notes() {
        assert!(note.first <= note.last, "{note:?}");
    }
});
